"""Results and comparisons in a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Column, Table

from dudi.evaluation.bootstrap import MEAN, Estimate
from dudi.evaluation.compare import Compared, Comparison
from dudi.evaluation.figures import FIGURES
from dudi.evaluation.result import Result, TaskResult

DASH = "–"
COLOURS = {"better": "green", "worse": "red", "": "default"}


def spelt(value: float, digits: int, signed: bool = False) -> str:
    if not math.isfinite(value):
        return DASH
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def with_interval(estimate: Estimate, digits: int) -> str:
    """1.451 [1.366, 1.540]"""
    if not math.isfinite(estimate.value):
        return DASH
    low, high = (spelt(v, digits) for v in (estimate.low, estimate.high))
    return f"{spelt(estimate.value, digits)} [{low}, {high}]"


def task_table(task: TaskResult) -> Table:
    """A line for each figure, a column for each language, the mean first."""
    languages = task.languages
    shown = [MEAN, *languages] if len(languages) > 1 else languages
    columns = [Column(code, justify="right") for code in shown]
    table = Table("", *columns, title=f"{task.name}: {len(task.rows)} rows")
    for name, own in task.figures.items():
        figure = FIGURES[name]
        cells = []
        for code in shown:
            estimate = own.get(code)
            # the whole interval for the mean alone: eleven languages must fit a terminal
            if estimate is None:
                cells.append(DASH)
            elif code == shown[0]:
                cells.append(with_interval(estimate, figure.digits))
            else:
                cells.append(spelt(estimate.value, figure.digits))
        table.add_row(f"{figure.title} [dim]{figure.unit}[/]", *cells)
    return table


def show_result(result: Result, console: Console) -> None:
    for task in result.tasks.values():
        console.print(task_table(task))
        for note in task.notes:
            console.print(f"[dim]{task.name}: {note}[/]", highlight=False, soft_wrap=True)
    for name, reason in result.skipped.items():
        console.print(f"[yellow]{name} was skipped:[/] {reason}", highlight=False, soft_wrap=True)


def comparison_table(comparison: Comparison, task: str) -> Table:
    """Means of a task (of one language, it alone): a line for each figure, a column a result."""
    columns = [Column(name, justify="right") for name in comparison.names]
    title = f"{task}, differences from {comparison.baseline}"
    table = Table("", *columns, title=title if len(columns) > 1 else task)
    for line in overall(comparison, task):
        figure = FIGURES[line.figure]
        table.add_row(f"{figure.title} [dim]{figure.unit}[/]", *_cells(line, figure.digits))
    return table


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
            low, high = (spelt(v, digits, True) for v in (change.low, change.high))
            told = f"{spelt(change.value, digits, True)} ({low} to {high})"
            text += f"\n[{COLOURS[verdict]}]{told}[/]"
        cells.append(text)
    return cells


def show_comparison(comparison: Comparison, console: Console) -> None:
    for task in comparison.tasks:
        console.print(comparison_table(comparison, task))
    for note in comparison.notes:
        console.print(f"[yellow]{note}[/]", highlight=False, soft_wrap=True)
    for result in comparison.results:
        for name, reason in result.skipped.items():
            console.print(
                f"[yellow]{result.name}: {name} was skipped:[/] {reason}",
                highlight=False,
                soft_wrap=True,
            )
