"""Several results side by side: each figure with its interval, and paired differences from one.

Differences are taken within resamples of the same rows, so both results must be of the same items
and draws, and a figure of as many tokens, characters, ... of each row and of the same teacher; what
is not comparable is told and left without a difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dudi.evaluation.bootstrap import MEAN, Estimate, difference
from dudi.evaluation.cuts import PROMPT
from dudi.evaluation.figures import FIGURES
from dudi.evaluation.result import NOTHING, Result, TaskResult, _safe

FEWEST = 10  # rows that an interval is believed of


@dataclass
class Compared:
    """One figure of one task and language, a value for each result."""

    task: str
    figure: str
    language: str  # or mean
    values: list[Estimate]
    differences: list[Estimate]  # from the baseline; NaN for itself and where there is none
    groups: int  # of rows that were drawn from, in the result with the fewest

    @property
    def verdicts(self) -> list[str]:
        """better, worse or "" where the interval holds 0, rows are too few for one, or neither
        direction is better."""
        better = FIGURES[self.figure].better
        if not better or self.groups < FEWEST:
            return [""] * len(self.values)
        sign = -1 if better == "lower" else 1
        return [
            "better" if min(sign * d.low, sign * d.high) > 0
            else "worse" if max(sign * d.low, sign * d.high) < 0
            else ""
            for d in self.differences
        ]  # fmt: skip


@dataclass
class Comparison:
    """Of results by name; `baseline` is what differences are from."""

    names: list[str]
    baseline: str
    lines: list[Compared]
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(line.task for line in self.lines))

    def of(self, task: str, language: str | None = None) -> list[Compared]:
        """Lines of a task; of one language (or mean) where it is given."""
        return [
            line for line in self.lines if line.task == task and language in (None, line.language)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: what could not be measured is None."""
        return {
            "names": self.names,
            "baseline": self.baseline,
            "notes": self.notes,
            "lines": [
                {
                    "task": line.task,
                    "figure": line.figure,
                    "language": line.language,
                    "values": [_safe(value) for value in line.values],
                    "differences": [_safe(value) for value in line.differences],
                    "verdicts": line.verdicts,
                }
                for line in self.lines
            ],
        }


def compare(results: Sequence[Result], baseline: str | None = None) -> Comparison:
    """Compare results of `evaluate_tasks`, by default with the first one.

    Replaces, for each figure, 1,000 times over::

        drawn = choice(rows, size=len(rows))          # the same rows for both
        differences.append(figure(new[drawn]) - figure(old[drawn]))

    with a 95 % interval of the differences. One that does not hold 0 makes a verdict; there are
    many of them in a table, and some are chance.

    Raises:
        ValueError: no result, two of one name, or a baseline that is none of them.
    """
    names = [result.name for result in results]
    if not names:
        raise ValueError("results must not be empty")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"results must have different names, got {twice!r} twice")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline must be one of {', '.join(names)}, got {baseline!r}")
    base = results[names.index(baseline or names[0])]
    comparison = Comparison(names, base.name, [], results=list(results))
    for task in dict.fromkeys(name for result in results for name in result.tasks):
        _compare_task(comparison, task, list(results), base)
    return comparison


def _compare_task(
    comparison: Comparison, name: str, results: Sequence[Result], base: Result
) -> None:
    tasks = [result.tasks.get(name) for result in results]
    old = base.tasks.get(name)
    paired = [new is not None and new is not old and _pair(new, old) for new in tasks]
    for result, new in zip(results, tasks, strict=True):
        if new is not None and new is not old and not _pair(new, old):
            comparison.notes.append(_why(name, result.name, base.name, new, old))
    without: dict[str, list[str]] = defaultdict(list)  # why, then figures
    for figure, known in FIGURES.items():
        whys = [
            _unlike(figure, own, base, name) if can else ""
            for own, can in zip(results, paired, strict=True)
        ]
        for result, why in zip(results, whys, strict=True):
            if why:
                without[f"{name}: {result.name} and {base.name} {why}"].append(known.title)
        like = [can and not why for can, why in zip(paired, whys, strict=True)]
        comparison.lines += _lines(name, figure, tasks, old, like)
    comparison.notes += [
        f"{why}: no differences of {', '.join(titles)}" for why, titles in without.items()
    ]


def _lines(
    name: str,
    figure: str,
    tasks: Sequence[TaskResult | None],
    old: TaskResult | None,
    like: Sequence[bool],  # whether a task's figure and the old one's are of the same
) -> list[Compared]:
    """Of one figure: the mean, where there are several languages, and each language."""
    sampled = [{} if task is None else task.sampled.get(figure, {}) for task in tasks]
    olds = {} if old is None else old.sampled.get(figure, {})
    languages = sorted({code for own in sampled for code in own} - {MEAN})
    lines = []
    for code in [MEAN, *languages] if len(languages) > 1 else languages:
        values = [own[code].estimate() if code in own else NOTHING for own in sampled]
        differences = [
            difference(own[code], olds[code]) if same and code in own and code in olds else NOTHING
            for own, same in zip(sampled, like, strict=True)
        ]
        groups = min(own[code].groups for own in sampled if code in own)
        lines.append(Compared(name, figure, code, values, differences, groups))
    return lines


def _pair(new: TaskResult, old: TaskResult | None) -> bool:
    return old is not None and (
        (new.data["sha256"], new.seed, new.resamples)
        == (old.data["sha256"], old.seed, old.resamples)
    )


def _why(task: str, name: str, base: str, new: TaskResult, old: TaskResult | None) -> str:
    if old is None:
        return f"{task}: {base} has no result that {name} could be compared with"
    if new.data["sha256"] != old.data["sha256"]:
        told = f"{task}: {name} and {base} are of different items: no paired differences"
        here, there = set(new.languages), set(old.languages)
        if here == there:
            return told
        only = [
            f"{who} has {', '.join(sorted(own))}"
            for who, own in ((name, here - there), (base, there - here))
            if own
        ]
        return f"{told}, and means over other languages ({'; '.join(only)} alone)"
    return f"{task}: {name} and {base} have other seeds or resamples: no paired differences"


def _unlike(figure: str, new: Result, old: Result, task: str) -> str:
    """Why a figure of the same items is of something else in two results; "" where it is not."""
    known = FIGURES[figure]
    sizes = [
        {row["row"]: known.size(row) for row in result.tasks[task].rows if known.counts(row)}
        for result in (new, old)
    ]
    both = sizes[0].keys() & sizes[1].keys()
    if not both:
        return ""
    if sizes[0].keys() != sizes[1].keys():  # nor would the draws be of the same rows
        return f"measured it over other rows ({len(sizes[0])} and {len(sizes[1])})"
    for name in known.settings:
        if new.settings.get(name) != old.settings.get(name):
            return f"have other values of {name}"
    if any(sizes[0][row] != sizes[1][row] for row in both):
        return "cut the same rows differently (another tokenizer, or other lengths)"
    left = [
        {row["row"]: [row.get(cut, 0) for cut in known.cuts] for row in result.tasks[task].rows}
        for result in (new, old)
    ]
    if any(left[0][row] != left[1][row] for row in both):
        return f"cut prompts differently (a larger {PROMPT} cuts none)"
    return ""
