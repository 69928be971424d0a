"""What a grid names of the user's own: students, teachers, data; where each lies, and its state.

Built-in ones (a new student of the demo's tokenizer, the embedded teacher and SmolLM2, the embedded
strings) need no name. Files and folders are known by the sizes and times of what they hold, so that
cells are trained again where one has changed; of the Hub's, the name is all that is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from pydantic import BaseModel, ConfigDict

from dudi.data import load_data
from dudi.demo_data import data_path
from dudi.models import load_model_config, load_tokenizer

MODEL = "model_name_or_path"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class OwnTeacher(_Strict):
    model_name_or_path: str
    dtype: str = "auto"


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
) -> None:
    """Raises what loading raises, before anything is trained; no weight is read."""
    models = {f"students.{name}": existing(own) for name, own in students.items()}
    models |= {f"teachers.{name}": own.model_name_or_path for name, own in teachers.items()}
    for place, path in models.items():
        if path is not None:
            load_model_config(path, {}, f"{place}.{MODEL}")
            load_tokenizer(path, f"{place}.{MODEL}")
    for rows in () if data is None else (data.train, data.validation):
        rows.load()


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
