"""Results and comparisons in a terminal: columns that do not fit go into a further table, since a
number that is wrapped or cropped can't be read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

from dudi.evaluation.bootstrap import MEAN, Estimate
from dudi.evaluation.compare import Compared, Comparison
from dudi.evaluation.figures import FIGURES, Figure
from dudi.evaluation.result import NOTHING, Result, TaskResult
from dudi.report_figures import DASH

UNBOUNDED = 10_000  # columns
LEGEND = "[low, high]: 95 % intervals over rows, not over seeds of training"
WORDS, NAMES = 14, 24  # where titles and names of runs are broken
COLOURS = {"better": "green", "worse": "red", "": "default"}


def spelt(value: float, digits: int, signed: bool = False) -> str:
    if not math.isfinite(value):
        return DASH
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def with_interval(estimate: Estimate, digits: int, signed: bool = False) -> str:
    """1.451 [1.366, 1.540]; without an interval, the value."""
    value, low, high = (spelt(v, digits, signed) for v in estimate)
    return value if DASH in (low, high) else f"{value} [{low}, {high}]"


def wrapped(text: str, width: int) -> str:
    """On several lines, where it is longer; not as markup."""
    return escape("\n".join(textwrap.wrap(text, width)))


def _titled(figure: Figure) -> str:
    return f"{wrapped(figure.title, WORDS)}\n[dim]{figure.unit}[/]"


def tables(
    title: str, names: Sequence[str], columns: Sequence[tuple[str, list[str]]], console: Console
) -> list[Table]:
    """Lines of `names` and columns (header, cells): as few tables as the console is wide for."""

    def table(part: Sequence[tuple[str, list[str]]]) -> Table:
        heads = (Column(head, justify="right", no_wrap=True) for head, _ in part)
        own = Table(Column("", no_wrap=True), *heads, title=title)
        for name, *cells in zip(names, *(cells for _, cells in part), strict=True):
            own.add_row(name, *cells)
        return own

    def fits(part: Sequence[tuple[str, list[str]]]) -> bool:
        unbounded = console.options.update_width(UNBOUNDED)
        return Measurement.get(console, unbounded, table(part)).maximum <= console.width

    parts: list[list[tuple[str, list[str]]]] = []
    for column in columns:
        if parts and fits([*parts[-1], column]):
            parts[-1].append(column)
        else:
            parts.append([column])
    return [table(part) for part in parts]


def task_tables(task: TaskResult, console: Console) -> list[Table]:
    """A line for each language, the mean first, a column for each figure."""
    languages = task.languages
    shown = [MEAN, *languages] if len(languages) > 1 else languages
    columns = []
    for name, own in task.figures.items():
        figure = FIGURES[name]
        cells = [with_interval(own.get(code, NOTHING), figure.digits) for code in shown]
        columns.append((_titled(figure), cells))
    return tables(f"{task.name}: {len(task.rows)} rows", shown, columns, console)


def show_result(result: Result, console: Console) -> None:
    for name, task in result.tasks.items():
        for table in task_tables(task, console):
            console.print(table)
        if not task.figures:
            _say(console, f"{name}:", "none of its metrics could be measured")
        for sentence in result.cuts(name):
            _say(console, f"{name}:", sentence)
        for note in task.notes:
            _say(console, f"{name}:", note, "dim")
    if any(task.figures for task in result.tasks.values()):
        _say(console, "", LEGEND)
    _show_skipped(result, "", console)


def _say(console: Console, start: str, text: str, style: str = "yellow") -> None:
    told = f"[{style}]{escape(start)}[/] {escape(text)}" if start else f"[dim]{escape(text)}[/]"
    console.print(told, highlight=False, soft_wrap=True)


def _show_skipped(result: Result, start: str, console: Console) -> None:
    for name, reason in result.skipped.items():
        _say(console, f"{start}{name} was skipped:", reason)


def comparison_tables(comparison: Comparison, task: str, console: Console) -> list[Table]:
    """Means of a task (of one language, it alone): a line for each figure, a column a result."""
    lines = overall(comparison, task)
    cells = [_cells(line, FIGURES[line.figure].digits) for line in lines]
    columns = [
        (wrapped(name, NAMES), list(own))
        for name, own in zip(comparison.names, zip(*cells, strict=True), strict=True)
    ]
    several = len(columns) > 1
    title = f"{task}, differences from {escape(comparison.baseline)}" if several else task
    return tables(title, [_titled(FIGURES[line.figure]) for line in lines], columns, console)


def overall(comparison: Comparison, task: str) -> list[Compared]:
    """The mean of each figure; of a task with one language, that language's."""
    lines = comparison.of(task)
    means = {line.figure for line in lines if line.language == MEAN}
    return [line for line in lines if line.language == MEAN or line.figure not in means]


def _cells(line: Compared, digits: int) -> list[str]:
    cells = []
    for value, change, verdict in zip(line.values, line.differences, line.verdicts, strict=True):
        text = spelt(value.value, digits)
        if math.isfinite(change.value):
            text += f"\n[{COLOURS[verdict]}]{with_interval(change, digits, True)}[/]"
        cells.append(text)
    return cells


def cut_notes(comparison: Comparison, task: str) -> list[str]:
    """What the limits on tokens cut, of each run, named where there are several."""
    several = len(comparison.results) > 1
    return [
        f"{result.name}: {sentence}" if several else sentence
        for result in comparison.results
        if task in result.tasks
        for sentence in result.cuts(task)
    ]


def show_comparison(comparison: Comparison, console: Console) -> None:
    for task in comparison.tasks:
        for table in comparison_tables(comparison, task, console):
            console.print(table)
        for note in cut_notes(comparison, task):
            _say(console, f"{task}:", note)
    if len(comparison.names) > 1 and comparison.lines:
        _say(console, "", LEGEND)
    for note in comparison.notes:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False, soft_wrap=True)
    for result in comparison.results:
        _show_skipped(result, f"{result.name}: ", console)
