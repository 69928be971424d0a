"""What a grid names of the user's own: students, teachers, data; where each lies, and its state.

Built-in ones (a new student of the demo's tokenizer, the embedded teacher and SmolLM2, the embedded
strings) need no name. Files and folders are known by the sizes and times of what they hold, so that
cells are trained again where one has changed; of the Hub's, the name is all that is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from pydantic import BaseModel, ConfigDict, model_validator

from dudi.data import load_data
from dudi.demo_data import data_path
from dudi.evaluation.items import task_items
from dudi.evaluation.sources import Absent
from dudi.evaluation.task import Task
from dudi.models import load_model_config, load_tokenizer

MODEL = "model_name_or_path"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class OwnTeacher(_Strict):
    model_name_or_path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Rows(_Strict):
    """As `dudi train` reads them."""

    dataset_name: str
    dataset_config: str | None = None
    split: str = "train"

    def load(self) -> Dataset:
        return load_data(self.dataset_name, name=self.dataset_config, split=self.split)


class Data(_Strict):
    """What is trained on, and what chooses learning rates."""

    train: Rows
    validation: Rows

    @model_validator(mode="after")
    def _apart(self) -> Data:
        if self.train == self.validation:
            raise ValueError(
                "train and validation must be different rows, got twice "
                f"{self.train.dataset_name!r}, split {self.train.split!r}"
            )
        return self


def existing(student: Mapping[str, Any]) -> str | None:
    """Its name or path, where it is not to be made new."""
    return student.get(MODEL)


def check_student(place: str, student: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of a new model beside an existing one."""
    if existing(student) is not None and len(student) > 1:
        more = ", ".join(sorted(student.keys() - {MODEL}))
        raise ValueError(f"{place} is an existing model, which has no {more} to choose")


def tokenizer_of(student: Mapping[str, Any]) -> str:
    return existing(student) or str(data_path("tokenizer"))


def check_there(
    students: Mapping[str, Mapping[str, Any]],
    teachers: Mapping[str, OwnTeacher],
    data: Data | None,
    tasks: Mapping[str, Task],  # by the domain's name
    verbalizing: Collection[str],  # methods with the context verbalizer
) -> None:
    """Raises what loading raises, before anything is trained; no weight is read."""
    models = {f"students.{name}": existing(own) for name, own in students.items()}
    models |= {f"teachers.{name}": own.model_name_or_path for name, own in teachers.items()}
    for place, path in models.items():
        if path is not None:
            load_model_config(path, {}, f"{place}.{MODEL}")
            load_tokenizer(path, f"{place}.{MODEL}")
    if data is not None:
        _check_language(data.train.load().column_names, verbalizing)
        data.validation.load()
    for name, task in tasks.items():
        if task.source.builtin is not None:
            continue
        try:
            task_items(task)
        except (Absent, FileNotFoundError, ValueError) as error:
            raise ValueError(f"domains.{name}: {error}") from error


def _check_language(columns: list[str], verbalizing: Collection[str]) -> None:
    if verbalizing and "language" not in columns:
        raise ValueError(
            f"data.train must have the column language for {', '.join(sorted(verbalizing))}, whose "
            f"context verbalizer writes in it; it has {', '.join(columns)}. Without one take "
            "no_context, or a method like it"
        )


def states(names: Iterable[str]) -> dict[str, list[list[Any]]]:
    """By name, of those that are here: each file with its size and time."""
    found = {name: _state(name) for name in sorted(set(names))}
    return {name: list(map(list, state)) for name, state in found.items() if state}


@lru_cache(maxsize=256)  # of one run; it asks for each cell
def _state(name: str) -> tuple[tuple[str, int, int], ...]:
    path = Path(name).expanduser()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    told = ((f, f.stat()) for f in files)
    return tuple((f.relative_to(path.parent).as_posix(), s.st_size, s.st_mtime_ns) for f, s in told)
