"""What is known of SEA-HELM (data/seahelm.yaml): its suite, and how scores are normalised.

    value = 100 max(0, (score - baseline) / (max - baseline))

as in docs/score_calculations.md and `normalize_score` of src/metrics/seahelm_metric.py: baseline is
chance (1 / n_options) for multiple choice, 0 for generation, and 25, the worst, for MetricX, which
is an error and best at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LOGPROBS = "-logprobs"
CODES = {"fil": "tl"}  # ours -> SEA-HELM's


@cache
def facts() -> dict[str, Any]:
    """The file, read once."""
    path = Path(__file__).parents[1] / "data" / "seahelm.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def seahelm_code(language: str) -> str:
    """A language as SEA-HELM calls it: Filipino is tl there."""
    return CODES.get(language, language)


def suite(languages: list[str], *, left_out: set[str]) -> dict[str, list[str]]:
    """The tasks of each language, in SEA-HELM's order, without those left out."""
    known = facts()["suite"]
    for language in languages:
        if seahelm_code(language) not in known:
            raise ValueError(
                f"languages must be among {', '.join(known)} (fil is tl), got {language!r}"
            )
    codes = dict.fromkeys(map(seahelm_code, languages))
    return {code: [task for task in known[code] if task not in left_out] for code in codes}


# ---- scores --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A figure that SEA-HELM scores a task by, and the plain score behind it."""

    name: str
    score: str  # its key in a result file
    baseline: float | None  # None: chance
    maximum: float
    normalised: bool  # the file has the normalised figure too


@dataclass(frozen=True)
class Task:
    name: str
    competency: str
    metric: str
    group: str | None = None  # averaged with the others of it, before the competency
    n_options: int | Mapping[str, int] | None = None
    parts: tuple[str, ...] = ()  # what it is put together of
    once: bool = False  # the same in every run, and run in the first alone

    def options(self, language: str) -> int | None:
        if isinstance(self.n_options, Mapping):
            return self.n_options.get(language)
        return self.n_options


@cache
def metrics() -> dict[str, Metric]:
    return {
        name: Metric(
            name,
            m["score"],
            None if m["baseline"] == "chance" else float(m["baseline"]),
            float(m["max"]),
            not m.get("same", False),
        )
        for name, m in facts()["metrics"].items()
    }


@cache
def tasks() -> dict[str, Task]:
    """By name, those scored by log-probabilities among them."""
    found = {}
    for name, t in facts()["tasks"].items():
        parts = tuple(t.get("parts", ()))
        plain = Task(name, t["competency"], t["metric"], t.get("group"), t.get("n_options"), parts)
        found[name] = plain
        if metrics()[plain.metric].baseline is None:
            found[name + LOGPROBS] = Task(
                name + LOGPROBS,
                plain.competency,
                "average_cumulative_probabilities",
                plain.group and plain.group + LOGPROBS,
                plain.n_options,
                tuple(part + LOGPROBS for part in parts),
                once=True,
            )
    return found


def baseline_of(task: Task, language: str) -> float | None:
    """On the scale of the task's score; None where the number of options is not known."""
    metric = metrics()[task.metric]
    if metric.baseline is not None:
        return metric.baseline
    n_options = task.options(language)
    return None if n_options is None else metric.maximum / n_options


def normalise(score: float, baseline: float, maximum: float) -> float:
    """0 at the baseline and below it, 100 at the maximum."""
    return 100 * max(0.0, (score - baseline) / (maximum - baseline))
