"""Tasks: small YAML files that say which rows are read, what is asked and what is measured.

A row's fields are put into jinja2 templates (sandboxed: a task may be somebody else's), which give
prompt and completion, or choices of which one is right. What is wrong with a file is told with its
name, the field, what was wanted and what was given. Built-in ones lie in data/tasks/.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dudi.demo_data import SPLITS, data_path
from dudi.evaluation.templates import check_expression, check_template

BUILTIN = ("ui_strings", "ui_choices", "mmlu_th", "vietnamese_exams", "udhr", "mediawiki")
Metric = Literal["nll", "kl", "calibration", "chrf", "length_ratio", "fidelity", "accuracy"]
OF_TEXT = ("nll", "kl", "calibration", "chrf", "length_ratio", "fidelity")
OF_CHOICES = ("accuracy", "calibration")
WRITTEN = {"chrf", "length_ratio", "fidelity"}  # metrics that need generations
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where rows come from: one of `file` (relative to the task's), `dataset` (a Hub id) and
    `builtin`."""

    file: str | None = None
    dataset: str | None = None
    config: str | None = None
    builtin: Literal[BUILTIN] | None = None  # type: ignore[valid-type]
    split: str | None = None
    seed: int = 0  # of the distractors of ui_choices

    @model_validator(mode="after")
    def _one(self) -> Source:
        given = [n for n in ("file", "dataset", "builtin") if getattr(self, n) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"must have one of file, dataset and builtin, got {got}")
        if self.builtin in ("ui_strings", "ui_choices") and self.split not in (None, *SPLITS):
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        return self


class Rows(_Strict):
    """Which rows: `limit` of each language, the first ones, or with `seed` drawn ones."""

    limit: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None


class Task(_Strict):
    """One task; `load_task` reads it from YAML."""

    name: Name
    about: str = ""
    source: Source
    language: str = ""  # template
    prompt: str = ""  # template; an empty prompt is the tokenizer's BOS, or EOS without one
    completion: str | None = None  # template
    examples: bool = False  # rows are as `dudi train` reads them, in place of the templates
    choices: str | list[str] | None = None  # an expression that gives a list, or templates
    answer: str | None = None  # an expression: the index or the text of the right choice
    group: str | None = None  # template: rows that are resampled together
    chat: bool = False  # prompt as the user's turn, where the tokenizer has a chat template
    ends: bool = True  # whether the end token of a completion counts
    metrics: list[Metric] = Field(default_factory=list)
    rows: Rows = Rows()

    @field_validator("language", "prompt", "completion", "group")
    @classmethod
    def _template(cls, source: str | None) -> str | None:
        if source is not None:
            check_template(source)
        return source

    @field_validator("choices")
    @classmethod
    def _choices(cls, given: str | list[str] | None) -> str | list[str] | None:
        if isinstance(given, str):
            check_expression(given)
        elif given is not None:
            if len(given) < 2:
                raise ValueError(f"must hold two choices at least, got {len(given)}")
            for source in given:
                check_template(source)
        return given

    @field_validator("answer")
    @classmethod
    def _answer(cls, source: str | None) -> str | None:
        if source is not None:
            check_expression(source)
        return source

    @model_validator(mode="before")
    @classmethod
    def _default_metrics(cls, given: Any) -> Any:
        if isinstance(given, dict) and not given.get("metrics"):
            kind = OF_CHOICES if given.get("choices") is not None else OF_TEXT
            return {**given, "metrics": list(kind)}
        return given

    @model_validator(mode="after")
    def _whole(self) -> Task:
        kinds = {"completion": self.completion, "choices": self.choices, "examples": self.examples}
        given = [name for name, value in kinds.items() if value not in (None, False)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"must have one of completion, choices and examples, got {got}")
        if (self.choices is None) != (self.answer is None):
            missing = "answer" if self.answer is None else "choices"
            raise ValueError(f"choices and answer go together, {missing} is missing")
        known = OF_CHOICES if self.choices is not None else OF_TEXT
        for metric in self.metrics:
            if metric not in known:
                kind = "choices" if self.choices is not None else "a completion"
                raise ValueError(
                    f"metrics of a task with {kind} must be of {', '.join(known)}, got {metric!r}"
                )
        return self

    @property
    def writes(self) -> bool:
        """Whether any metric needs generations."""
        return not WRITTEN.isdisjoint(self.metrics)


def builtin_tasks() -> list[str]:
    """Names of the built-in tasks."""
    return sorted(path.stem for path in data_path("tasks").glob("*.yaml"))


def load_task(task: Task | str | Path) -> Task:
    """A task by a built-in name or the path of a YAML file; a `Task` is returned as it is.

    Raises ValueError for what is neither, and for a file that is no task: the message has file,
    field, what was wanted and what was given.
    """
    if isinstance(task, Task):
        return task
    if str(task) in builtin_tasks():
        return _read(data_path("tasks") / f"{task}.yaml")
    path = Path(task).expanduser()
    if not path.is_file():
        raise ValueError(
            f"task must be a YAML file or one of {', '.join(builtin_tasks())}, got {str(task)!r}"
        )
    return _read(path)


def load_tasks(tasks: Iterable[Task | str | Path]) -> list[Task]:
    """Several, whose names must differ; "all" is every built-in one."""
    wanted = [t for task in tasks for t in (builtin_tasks() if task == "all" else [task])]
    loaded = [load_task(task) for task in wanted]
    names = [task.name for task in loaded]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"tasks must have different names, got {twice!r} twice")
    if not loaded:
        raise ValueError("tasks must not be empty")
    return loaded


def _read(path: Path) -> Task:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"task {path} must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"task {path} must be a mapping, got {type(content).__name__}")
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"task {path}: {_told(error)}") from None
    file = task.source.file
    if file is None:
        return task
    beside = str(path.parent / Path(file).expanduser())
    return task.model_copy(update={"source": task.source.model_copy(update={"file": beside})})


def _told(error: ValidationError) -> str:
    """Each fault as field: what was wanted, got what."""
    faults = []
    for fault in error.errors(include_url=False):
        place = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        simple = isinstance(fault["input"], (str, int, float, bool, type(None)))
        got = f", got {fault['input']!r}" if simple and ", got" not in message else ""
        faults.append(f"{place}: {message}{got}" if place else f"{message}{got}")
    return "; ".join(faults)
