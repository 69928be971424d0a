"""Results: figures with intervals by task and language, the rows they are of, and what made them.

A result is kept as one JSON file, whole or not at all; `load_result` checks what it reads, so that
a comparison says which file is at fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dudi.callbacks import checked_object, write_text
from dudi.evaluation.bootstrap import MEAN, RESAMPLES, Estimate, Sampled, sampled
from dudi.evaluation.cuts import counted, told
from dudi.evaluation.figures import FIGURES
from dudi.intervals import or_none

FORMAT = 1
FILE = "tasks.json"  # of a result in a run's folder
PACKAGES = ("dudi", "torch", "transformers", "sacrebleu", "py3langid")
NOTHING = Estimate(math.nan, math.nan, math.nan)


@dataclass
class TaskResult:
    """Of one task; `rows` are JSON-safe values of each row, which every figure is made of."""

    name: str
    about: str
    data: dict[str, Any]  # source, number of items, sha256
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why
    seed: int = 0
    resamples: int = RESAMPLES

    @cached_property
    def sampled(self) -> dict[str, dict[str, Sampled]]:
        """Figure, then language (and mean): those that the rows have."""
        found = {
            name: sampled(figure, self.rows, self.seed, self.resamples)
            for name, figure in FIGURES.items()
        }
        return {name: own for name, own in found.items() if own}

    @property
    def figures(self) -> dict[str, dict[str, Estimate]]:
        """Figure, then language (and mean), with intervals."""
        return {
            name: {language: own.estimate() for language, own in languages.items()}
            for name, languages in self.sampled.items()
        }

    @property
    def languages(self) -> list[str]:
        return sorted({row["language"] for row in self.rows})

    def estimate(self, figure: str, language: str = MEAN) -> Estimate:
        """One figure; NaN where it was not measured. Raises ValueError for a name of none."""
        if figure not in FIGURES:
            raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {figure!r}")
        own = self.sampled.get(figure, {}).get(language)
        return NOTHING if own is None else own.estimate()

    def value(self, figure: str, language: str = MEAN) -> float:
        return self.estimate(figure, language).value


@dataclass
class Result:
    """Of one model; `skipped` has the reason for each task whose data is absent."""

    name: str
    tasks: dict[str, TaskResult]
    skipped: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def cuts(self, task: str) -> list[str]:
        """What the limits on tokens cut in a task, told; empty where they cut nothing."""
        return told(self.tasks[task].rows, self.settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: what could not be measured is None."""
        return {
            "format": FORMAT,
            "name": self.name,
            "settings": self.settings,
            "versions": self.versions,
            "skipped": self.skipped,
            "tasks": {name: _task_dict(task) for name, task in self.tasks.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], place: str = "result") -> Result:
        """What `to_dict` gave. Raises ValueError, naming `place`, for anything else."""
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{place} must be a result of dudi evaluate with format {FORMAT}, "
                f"got format {content.get('format')!r}"
            )
        try:
            tasks = {name: _task(name, own) for name, own in content["tasks"].items()}
            return cls(
                content["name"],
                tasks,
                dict(content["skipped"]),
                dict(content["settings"]),
                dict(content["versions"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            told = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{place} is no whole result of dudi evaluate: {told}") from None

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all."""
        path = Path(path)
        write_text(path, json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False))
        return path


def _task_dict(task: TaskResult) -> dict[str, Any]:
    return {
        "about": task.about,
        "data": task.data,
        "figures": {
            name: {language: _safe(estimate) for language, estimate in own.items()}
            for name, own in task.figures.items()
        },
        "cuts": counted(task.rows),
        "notes": task.notes,
        "bootstrap": {"seed": task.seed, "resamples": task.resamples},
        "samples": task.samples,
        "rows": task.rows,
    }


def _safe(estimate: Estimate) -> dict[str, float | None]:
    return {name: or_none(value) for name, value in estimate._asdict().items()}


def _task(name: str, content: Mapping[str, Any]) -> TaskResult:
    bootstrap = content["bootstrap"]
    task = TaskResult(
        name,
        content["about"],
        content["data"],
        content["rows"],
        content["samples"],
        content["notes"],
        bootstrap["seed"],
        bootstrap["resamples"],
    )
    for row in task.rows:
        if not {"row", "language", "group"} <= row.keys():
            raise ValueError(f"a row of task {name} lacks row, language or group")
    return task


def load_result(path: str | Path) -> Result:
    """A result's JSON file, or a folder with one as tasks.json.

    Raises FileNotFoundError where there is none, ValueError for a file that is none.
    """
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"run must be a result of dudi evaluate, got {file}: no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must hold JSON: {error}") from error
    return Result.from_dict(checked_object(content, str(file)), str(file))


def versions() -> dict[str, str]:
    """Of what the figures depend on; packages that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
