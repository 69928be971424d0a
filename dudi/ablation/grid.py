"""The grid that a YAML file describes, and its cells.

A cell is method x setting x seed, or a trial of a learning rate on the validation split. Its hash
is of all that decides its result, so that a done cell is kept and a changed one runs again.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dudi.ablation.methods import (
    GIVEN,
    OFF,
    SAME_TEXT,
    START,
    Method,
    Variant,
    check_among,
    check_options,
    with_variants,
)
from dudi.ablation.own import Data, OwnTeacher, check_student, existing, states
from dudi.config import nearest, read_config_file
from dudi.evaluation.task import Metric, Task, builtin_tasks, load_task

FORMAT = 1  # raise it where the same configuration gives another result
TEACHERS = ("embedded", "smollm2")  # built in
STRINGS = "translation"  # the task of the embedded strings
FILE_NAME = re.compile(r"\w[\w.]*")  # of a part of one: no hyphen, which is between parts
FILES = ("lexicon", "teacher_cache", "vocabulary_verbalizer")  # options that may name one


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WarmUp(_Strict):
    """Plain cross-entropy that makes a student to start from."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rate: float = Field(gt=0)


class Tune(_Strict):
    """One sweep for all methods, by NLL a character on the validation split."""

    learning_rates: list[float] = Field(min_length=1)
    seed: int
    setting: str
    beyond: int = Field(0, ge=0)  # further rates, one by one, while the best one is at an end


class EvaluationPlan(_Strict):
    validation_rows: int = Field(gt=0)  # all languages together
    validations: int = Field(gt=0)  # on the way, at equal intervals
    generate_rows: int = Field(ge=0)  # a language
    batch: int = Field(64, gt=0)


class Domain(_Strict):
    """Where cells are tested: a task of `dudi evaluate`."""

    task: str  # a built-in one, or a file
    metrics: list[Metric]
    limit: int | None = Field(None, gt=0)  # rows a language
    split: Literal["test", "validation"] = "test"  # of the embedded strings

    def of_task(self, name: str) -> Task:
        """Raises ValueError for no task, and for metrics that it has not."""
        given = load_task(self.task).model_dump() | {"metrics": self.metrics}
        try:
            return Task.model_validate(given)
        except ValidationError as error:
            raise ValueError(f"domains.{name}: {_told(error)}") from None


class Setting(_Strict):
    title: str
    student: str
    teacher: str
    methods: list[str] | Literal["all"]
    steps: int | None = Field(None, gt=0)
    seconds_of: str | None = None  # or: the seconds of this method in the setting `like`
    like: str | None = None
    languages: list[str] | None = None  # of source and target, or of `data`'s responses; None: all
    batch: int | None = Field(None, gt=0)
    kl: bool = True  # whether KL to the teacher is measured on the test split

    @model_validator(mode="after")
    def _one_budget(self) -> Setting:
        if (self.steps is None) == (self.seconds_of is None):
            raise ValueError("must have one of steps and seconds_of")
        if (self.seconds_of is None) != (self.like is None):
            raise ValueError("seconds_of and like go together")
        return self


class Grid(_Strict):
    seeds: list[int] = Field(min_length=1)
    students: dict[str, dict[str, Any]]
    warm_up: WarmUp | None = None  # of new students
    training: dict[str, Any]
    evaluation: EvaluationPlan
    domains: dict[str, Domain]
    settings: dict[str, Setting]
    tune: Tune | None = None
    train_rows: int | None = Field(None, gt=0)  # drawn ones of the train split; None is all
    teachers: dict[str, OwnTeacher] = Field(default_factory=dict)
    data: Data | None = None  # None: the embedded strings
    methods: dict[str, Variant] = Field(default_factory=dict)  # beside the built-in ones

    @cached_property
    def known(self) -> dict[str, Method]:
        """All methods by name, in the order of reports."""
        return with_variants(self.methods)

    def methods_of(self, setting: Setting) -> list[str]:
        return list(self.known) if setting.methods == "all" else setting.methods

    def method(self, name: str) -> Method:
        return self.known[name]

    def rate_of(self, name: str) -> str:
        """Whose trials a method's learning rate comes from: its own, or where it can't be tried in
        the setting of the trials, those of the method that it is tuned as."""
        tried = self.tune is not None and applies(self, name, self.settings[self.tune.setting])
        return name if tried else self.known[name].tuned_as or name

    @field_validator("students")
    @classmethod
    def _students(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, own in given.items():
            check_student(f"students.{name}", own)
        return given

    @model_validator(mode="after")
    def _teachers(self) -> Grid:
        taken = sorted(set(TEACHERS) & self.teachers.keys())
        if taken:
            raise ValueError(f"teachers must have names of their own, got {', '.join(taken)}")
        return self

    @model_validator(mode="after")
    def _own_data(self) -> Grid:
        for name, own in self.students.items():
            if existing(own) is None and self.warm_up is None:
                raise ValueError(f"warm_up must be given: students.{name} is new")
            if self.data is not None and existing(own) is None:
                raise ValueError(
                    f"students.{name} must have model_name_or_path where there is data: a new "
                    "student is one of the embedded strings' tokenizer"
                )
        for name, domain in self.domains.items():
            if domain.split == "validation" and (domain.task != STRINGS or self.data is not None):
                raise ValueError(
                    f"domains.{name}.split is of the task {STRINGS} alone, where there is no data"
                )
        return self

    @model_validator(mode="after")
    def _options(self) -> Grid:
        check_options("training", self.training, (*GIVEN, *OFF))
        for name, own in self.methods.items():
            if own.tuned_as is not None:
                check_among(f"methods.{name}.tuned_as", own.tuned_as, self.known)
        return self

    @model_validator(mode="after")
    def _names(self) -> Grid:
        for name in (*self.settings, *self.methods):
            if FILE_NAME.fullmatch(name) is None:
                raise ValueError(
                    "settings and methods must have names of letters, digits, _ and ., got "
                    f"{name!r}"
                )
        for name, setting in self.settings.items():
            check_among(f"settings.{name}.student", setting.student, self.students)
            check_among(f"settings.{name}.teacher", setting.teacher, (*TEACHERS, *self.teachers))
            for each in self.methods_of(setting):
                check_among(f"settings.{name}.methods", each, self.known)
            if setting.seconds_of is not None:
                check_among(f"settings.{name}.seconds_of", setting.seconds_of, self.known)
            if setting.like is not None:
                check_among(f"settings.{name}.like", setting.like, self.settings)
                self._check_like(name, setting, self.settings[setting.like])
        if self.tune is not None:
            check_among("tune.setting", self.tune.setting, self.settings)
            if self.tune.seed in self.seeds:
                raise ValueError(f"tune.seed must be none of seeds, got {self.tune.seed}")
        elif any(setting.like for setting in self.settings.values()):
            raise ValueError("seconds_of needs tune: seconds a step are measured there")
        elif "learning_rate" not in self.training:
            raise ValueError("training.learning_rate must be given where there is no tune")
        return self

    def _check_like(self, name: str, setting: Setting, like: Setting) -> None:
        """Seconds a step are those of the trials, and differences are to what is alike."""
        if like.steps is None:
            raise ValueError(f"settings.{name}.like must name a setting with steps")
        for field in ("student", "teacher", "languages", "batch"):
            own, theirs = getattr(setting, field), getattr(like, field)
            if own != theirs:
                raise ValueError(
                    f"settings.{name}.{field} must be that of {setting.like}, {theirs!r}, got "
                    f"{own!r}"
                )
        if self.tune is not None and setting.like != self.tune.setting:
            raise ValueError(
                f"settings.{name}.like must be tune.setting, where seconds a step are measured, "
                f"{self.tune.setting!r}, got {setting.like!r}"
            )


def read_grid(path: str | Path) -> Grid:
    """Raises ValueError with file and field for what is no grid."""
    try:
        return Grid.model_validate(read_config_file(path))
    except ValidationError as error:
        raise ValueError(f"{path}: {_told(error)}") from None


def _told(error: ValidationError) -> str:
    """Each fault with its place; those of the whole grid name theirs."""
    faults = []
    for fault in error.errors(include_url=False):
        place, told = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        faults.append(f"{place}: {told}" if place else told)
    return "; ".join(faults)


class Cell(NamedTuple):
    """What is trained and tested once."""

    setting: str
    method: str
    seed: int
    trial: float | None = None  # a learning rate that is tried, on the validation split alone

    @property
    def name(self) -> str:
        told = f"{self.setting}-{self.method}-{self.seed}"
        return told if self.trial is None else f"tune-{told}-{self.trial:g}"


class Measured(NamedTuple):
    """Of a method, in the trials."""

    learning_rate: float
    seconds_a_step: float
    tried: tuple[float, ...] = ()  # rates

    @property
    def end(self) -> str:
        """Of the rates tried, where the best one is at one; a better one may lie beyond."""
        if len(self.tried) < 2 or min(self.tried) < self.learning_rate < max(self.tried):
            return ""
        return "lowest" if self.learning_rate == min(self.tried) else "highest"


def applies(grid: Grid, name: str, setting: Setting) -> bool:
    return setting.teacher != "embedded" or not grid.method(name).other_tokenizer


def cells_of(grid: Grid) -> list[Cell]:
    """Of the report: the start and each method, seed by seed, so that an unfinished grid has whole
    seeds."""
    return [
        Cell(name, each, seed)
        for seed in grid.seeds
        for name, setting in grid.settings.items()
        for each in (*([START] if setting.like is None else []), *grid.methods_of(setting))
        if each == START or applies(grid, each, setting)
    ]


def steps_of(grid: Grid, cell: Cell, measured: dict[str, Measured]) -> int:
    """Optimizer steps of a cell; of one for equal seconds, as many as take them."""
    if cell.method == START:
        return 0
    setting = grid.settings[cell.setting]
    if setting.steps is not None:
        return setting.steps
    like = grid.settings[str(setting.like)]
    seconds = float(like.steps or 0) * measured[str(setting.seconds_of)].seconds_a_step
    own = measured[grid.rate_of(cell.method)]
    return max(1, round(seconds / own.seconds_a_step))


def learning_rate_of(grid: Grid, cell: Cell, measured: dict[str, Measured]) -> float | None:
    if cell.trial is not None or cell.method == START:
        return cell.trial
    if grid.tune is None:
        return float(grid.training["learning_rate"])
    return measured[grid.rate_of(cell.method)].learning_rate


def resolved(grid: Grid, cell: Cell, measured: dict[str, Measured]) -> dict[str, Any]:
    """All that decides a cell's result, JSON-safe."""
    setting = grid.settings[cell.setting]
    steps = steps_of(grid, cell, measured)
    own = None if cell.method == START else grid.method(cell.method)
    training = dict(grid.training)
    if setting.batch is not None:
        training["per_device_train_batch_size"] = setting.batch
    rate = learning_rate_of(grid, cell, measured)
    options = {} if own is None else {"learning_rate": rate, "max_steps": steps}
    options = training | ({} if own is None else own.resolved(steps)) | options
    return {
        "format": FORMAT,
        **cell._asdict(),
        "steps": steps,
        "student": grid.students[setting.student],
        "warm_up": grid.warm_up and grid.warm_up.model_dump(),
        "teacher": setting.teacher,
        "languages": setting.languages,
        "train_rows": grid.train_rows,
        "kl": setting.kl and cell.trial is None,
        "data": "given" if own is None else own.data,
        "options": options,
        "evaluation": grid.evaluation.model_dump(),
        "domains": {}
        if cell.trial is not None
        else {name: _of_domain(domain) for name, domain in grid.domains.items()},
        **_of_own(grid, cell, options),
    }


def _of_domain(domain: Domain) -> dict[str, Any]:
    return domain.model_dump(exclude={"split"} if domain.split == "test" else None)


def _of_own(grid: Grid, cell: Cell, options: dict[str, Any]) -> dict[str, Any]:
    """What of a cell's result is decided by the user's own models and files."""
    setting, found = grid.settings[cell.setting], dict[str, Any]()
    files = [options.get(name) for name in FILES]
    names = [file for file in files if isinstance(file, str) and file != SAME_TEXT]
    if cell.trial is None:  # a trial sees no test
        names += [file for domain in grid.domains.values() for file in _files_of(domain.task)]
    if (student := existing(grid.students[setting.student])) is not None:
        names.append(student)
    if (teacher := grid.teachers.get(setting.teacher)) is not None:
        found["own_teacher"] = teacher.model_dump()
        names.append(teacher.model_name_or_path)
    if grid.data is not None:
        found["data_of"] = grid.data.model_dump()
        names += [grid.data.train.dataset_name, grid.data.validation.dataset_name]
    there = states(names)
    return found | ({"files": there} if there else {})


def _files_of(task: str) -> list[str]:
    """Of a task that is not built in: itself, and what it reads."""
    if task in builtin_tasks():
        return []
    source = load_task(task).source
    read = source.file or source.dataset  # a dataset may lie in a folder here
    return [task] if read is None else [task, read]


def hash_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def selected(cells: list[Cell], only: str | None) -> list[Cell]:
    """`method=dudi,method=sft,setting=main,seed=0`: values of one name are alternatives."""
    wanted: dict[str, set[str]] = {}
    for part in filter(None, (only or "").split(",")):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in ("method", "setting", "seed"):
            raise ValueError(
                f"only must be method=..., setting=... or seed=..., joined by commas, got {part!r}"
            )
        known = sorted({str(getattr(cell, name)) for cell in cells})
        if value not in known:
            raise ValueError(
                f"only: {name} must be one of {', '.join(known)}, got {value!r}"
                f"{nearest(value, known)}"
            )
        wanted.setdefault(name, set()).add(value)
    return [c for c in cells if all(str(getattr(c, n)) in own for n, own in wanted.items())]
