"""A comparison as one self-contained HTML page: no scripts, no requests, light or dark.

Each figure is a table of values by language with paired differences, beside it a drawing of the
intervals (SVG, made here); data/compare.html.j2 is the page.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from dudi.callbacks import write_text
from dudi.evaluation.bootstrap import MEAN, Estimate
from dudi.evaluation.compare import Compared, Comparison
from dudi.evaluation.figures import FIGURES
from dudi.evaluation.tables import DASH, cut_notes, spelt, with_interval
from dudi.page import page
from dudi.report_figures import labelled, language_name, ticks

WIDTH, LEFT, RIGHT, LINE = 420.0, 92.0, 8.0, 11.0  # of a drawing, in SVG units
SAMPLES = 3  # of each language
MAX_TEXT = 600


class Cell(NamedTuple):
    value: str
    interval: str
    change: str  # "" for the baseline
    verdict: str


class Bar(NamedTuple):
    """An interval and its value in SVG units; of a figure that was not measured, none is drawn."""

    run: int
    y: float
    low: float
    value: float
    high: float
    text: str


class Drawing(NamedTuple):
    height: float
    ticks: list[tuple[float, str]]
    bars: list[Bar]
    labels: list[tuple[float, str]]


class Block(NamedTuple):
    """One figure of a task."""

    title: str
    unit: str
    better: str
    rows: list[tuple[str, list[Cell]]]
    drawing: Drawing | None


def blocks(comparison: Comparison, task: str) -> list[Block]:
    """Figures of a task in order."""
    found = []
    for name, figure in FIGURES.items():
        lines = [line for line in comparison.of(task) if line.figure == name]
        if lines:
            rows = [(line.language, _cells(line, figure.digits)) for line in lines]
            drawing = _drawing(lines, figure.digits)
            found.append(Block(figure.title, figure.unit, figure.better, rows, drawing))
    return found


def _cells(line: Compared, digits: int) -> list[Cell]:
    cells = []
    for value, change, verdict in zip(line.values, line.differences, line.verdicts, strict=True):
        told, interval = "", ""
        if math.isfinite(change.value):
            low, high = (spelt(v, digits, True) for v in (change.low, change.high))
            told = spelt(change.value, digits, True)
            if math.isfinite(change.low):
                told += f" ({low} to {high})"
        if math.isfinite(value.low):
            interval = f"{spelt(value.low, digits)} to {spelt(value.high, digits)}"
        cells.append(Cell(spelt(value.value, digits), interval, told, verdict))
    return cells


def _drawing(lines: list[Compared], digits: int) -> Drawing | None:
    """Intervals under each other, by language and then by result."""
    ends = [end for line in lines for value in line.values for end in value if math.isfinite(end)]
    if not ends:
        return None
    low, high = min(ends), max(ends)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - pad, high + pad

    def at(x: float) -> float:
        return round(LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    bars, labels, y = [], [], 8.0
    for line in lines:
        labels.append((y + 4, _name(line.language)))
        for run, value in enumerate(line.values):
            if math.isfinite(value.value):
                bars.append(_bar(run, y, value, at, digits))
            y += LINE
        y += LINE
    marks = [(at(x), text) for x, text in labelled(ticks(low, high))]
    return Drawing(round(y + 14, 1), marks, bars, labels)


def _bar(run: int, y: float, value: Estimate, at: Any, digits: int) -> Bar:
    ends = [at(v if math.isfinite(v) else value.value) for v in (value.low, value.high)]
    return Bar(run, round(y, 1), ends[0], at(value.value), ends[1], with_interval(value, digits))


def _name(language: str) -> str:
    return "Mean" if language == MEAN else language_name(language)


def samples(comparison: Comparison, task: str) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each language that any result wrote something for."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run, result in enumerate(comparison.results):
        own = result.tasks.get(task)
        for sample in own.samples if own else ():
            rows = found.setdefault(sample["language"], {})
            if sample["row"] not in rows and len(rows) >= SAMPLES:
                continue
            row = rows.setdefault(sample["row"], {**_clipped(sample), "written": {}})
            row["written"][run] = _clip(sample["generation"])
    return {code: list(rows.values()) for code, rows in sorted(found.items())}


def _clipped(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: _clip(sample[name]) for name in ("prompt", "reference")}


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rstrip() + " …"


def render(comparison: Comparison) -> str:
    """The page."""
    return page(
        "compare.html.j2",
        {"language": _name},
        comparison=comparison,
        tasks=[
            {
                "name": name,
                "result": next(r.tasks[name] for r in comparison.results if name in r.tasks),
                "blocks": blocks(comparison, name),
                "samples": samples(comparison, name),
                "notes": _notes(comparison, name),
            }
            for name in comparison.tasks
        ],
        skipped=_skipped(comparison),
        size={"width": WIDTH},
        dash=DASH,
    )


def _notes(comparison: Comparison, task: str) -> list[str]:
    own = [r.tasks[task].notes for r in comparison.results if task in r.tasks]
    notes = dict.fromkeys(note for notes in own for note in notes)
    return [*cut_notes(comparison, task), *notes]


def _skipped(comparison: Comparison) -> list[tuple[str, str, str]]:
    return [
        (result.name, task, reason)
        for result in comparison.results
        for task, reason in result.skipped.items()
    ]


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Write the page, whole or not at all."""
    path = Path(path)
    write_text(path, render(comparison))
    return path
