"""From numbers to what the report draws: printed figures, line charts, tables with bars.

A line chart is coordinates of SVG polylines, raw and smoothed, with round ticks; a result is one
figure of every model by language, each cell with its bar's share of the longest and whether it is
the best. Pure functions: data/report.html.j2 draws them, in light or dark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeGuard

from dudi.verbalize import LANGUAGE_NAMES

DASH = "–"
POINTS = tuple[list[float], list[float]]  # steps and values
MAX_POINTS = 400  # of a drawn curve; more would only make the file larger


class Figure(NamedTuple):
    """One measured quantity: how it is named, printed and judged."""

    key: str
    title: str
    unit: str
    digits: int
    lower_is_better: bool
    trivial: float | None = None  # a value that says nothing where every model has it


FIGURES = (
    Figure("nll_per_char", "NLL per character", "nats", 3, True),
    Figure("nll_per_token", "NLL per token", "nats", 3, True),
    Figure("kl_to_teacher", "KL to teacher", "nats a token", 3, True, 0.0),  # the teacher itself
    Figure("chrf", "chrF of greedy generations", "0 to 100", 1, False),
)
CURVES = (
    ("loss", "Total loss", "weighted sum of a run's own signals"),
    (
        "off_policy_loss",
        "Off-policy signal",
        "divergence, a token of the references",
    ),
    ("on_policy_loss", "On-policy signal", "divergence, a token of own samples"),
    ("preference_loss", "Preference signal", "references over own samples, a pair"),
    ("ce_loss", "Cross-entropy", "nats a token of the references"),
    ("entropy", "Entropy", "nats a token of the student's predictions"),
    ("eval_nll_per_char", "Held-out NLL", "nats a character, during training"),
)


# ---- printing numbers --------------------------------------------------------------------------


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3, signed: bool = False) -> str:
    """Fixed digits; an en dash for what could not be measured."""
    if not is_number(value):
        return DASH
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def short(value: Any) -> str:
    """A value of whatever magnitude in about three digits: 0.412, 18.3, 1,234."""
    if not is_number(value):
        return DASH
    size = abs(value)
    return number(value, 3 if size < 10 else 1 if size < 1000 else 0)


def count(value: Any) -> str:
    """4,305 -> 4,305; 1,250,000 -> 1.25 M."""
    if not is_number(value):
        return DASH
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def duration(seconds: Any) -> str:
    if not is_number(seconds):
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def moment(text: Any) -> str:
    """An ISO time as people write it."""
    try:
        return datetime.fromisoformat(str(text)).strftime("%-d %B %Y, %H:%M %Z").strip()
    except ValueError:
        return str(text)


def percent(new: float, old: float) -> str:
    """The change in percent of the old value, signed."""
    return f"{100 * (new - old) / abs(old):+.1f} %".replace("-", "−")


def option(value: Any) -> str:
    """A setting as one line."""
    if value is None:
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def language_name(code: str) -> str:
    return {"all": "All rows"}.get(code) or LANGUAGE_NAMES.get(code, code)


# ---- charts ------------------------------------------------------------------------------------


class Line(NamedTuple):
    run: str
    raw: str  # points of an SVG polyline
    smooth: str
    first: str
    last: str


class LineChart(NamedTuple):
    title: str
    note: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]


# Of the drawing in SVG units; the page scales it to its column.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360.0, 200.0, 40.0, 12.0, 10.0, 24.0


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * m for m in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [step * i for i in range(first, last + 1)]


def labelled(marks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with as many decimals as their step needs."""
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(mark, number(mark, digits)) for mark in marks]


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving mean over about a tenth of the values: it does not lag."""
    half = max(1, len(values) // 20) if len(values) >= 8 else 0
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def curve(records: Iterable[dict[str, Any]], key: str, offset: float) -> POINTS:
    """Steps and finite values of one metric, shifted by the steps of an earlier run."""
    kept = [(r["step"] + offset, r[key]) for r in records if is_number(r.get(key)) and "step" in r]
    return [step for step, _ in kept], [value for _, value in kept]


def _span(values: Iterable[float], margin: float) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    pad = margin * (high - low) or margin * abs(high) or margin
    return low - pad, high + pad


def line_chart(title: str, note: str, curves: Mapping[str, POINTS]) -> LineChart:
    """Coordinates of one small chart, raw and smoothed, a line for each run."""
    x_low, x_high = _span((x for xs, _ in curves.values() for x in xs), 0.01)
    y_low, y_high = _span((y for _, ys in curves.values() for y in ys), 0.06)

    def at_x(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def at_y(y: float) -> float:
        return round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    def polyline(xs: Sequence[float], ys: Sequence[float]) -> str:
        stride = math.ceil(len(xs) / MAX_POINTS)
        points = zip(xs[::stride], ys[::stride], strict=True)
        return " ".join(f"{at_x(x)},{at_y(y)}" for x, y in points)

    lines = []
    for run, (xs, ys) in curves.items():
        means = smoothed(ys)
        ends = (short(means[0]), short(means[-1]))
        lines.append(Line(run, polyline(xs, ys), polyline(xs, means), *ends))
    return LineChart(
        title,
        note,
        [(at_x(x), f"{x:,.0f}") for x in ticks(x_low, x_high) if x == int(x)],
        [(at_y(y), text) for y, text in labelled(ticks(y_low, y_high))],
        lines,
    )


def loss_charts(metrics: Mapping[str, list[dict[str, Any]]]) -> list[LineChart]:
    """A chart for each signal that was logged; runs that go on from `warm` start at its end."""
    warm_steps = max((r.get("step", 0) for r in metrics.get("warm", [])), default=0)
    charts = []
    for key, title, note in CURVES:
        curves = {
            run: curve(records, key, 0 if run == "warm" else warm_steps)
            for run, records in metrics.items()
        }
        curves = {run: points for run, points in curves.items() if points[0]}
        if any(len(xs) > 1 for xs, _ in curves.values()):
            charts.append(line_chart(title, note, curves))
    return charts


# ---- results -----------------------------------------------------------------------------------


class Cell(NamedTuple):
    text: str
    share: float  # of the longest bar, in percent
    best: bool


class Result(NamedTuple):
    """One figure of every model: the rows of a table and of a bar chart."""

    figure: Figure
    rows: list[tuple[str, list[Cell]]]  # "mean" or a language's code


def compared(figure: Figure, values: Mapping[str, Any], longest: float = 0) -> list[Cell]:
    """One figure of every model; the best is that of the trained ones, where there are several."""
    trained = [v for label, v in values.items() if label != "teacher" and is_number(v)]
    best = (min if figure.lower_is_better else max)(trained) if len(trained) > 1 else None
    cells = []
    for label, value in values.items():
        share = 100 * max(value, 0) / longest if is_number(value) and longest else 0
        is_best = label != "teacher" and best is not None and value == best
        cells.append(Cell(number(value, figure.digits), round(share, 2), is_best))
    return cells


def _figures_of(evaluation: Mapping[str, Any], code: str) -> dict[str, Any]:
    """Figures of one language, or of the mean over all."""
    if code == "mean":
        return evaluation.get("mean", {})
    return evaluation.get("languages", {}).get(code, {})


def results(evaluations: Mapping[str, dict[str, Any]]) -> list[Result]:
    """Every figure that was measured, by language and in the mean."""
    codes = {code for e in evaluations.values() for code in e.get("languages", {})}
    found = []
    for figure in FIGURES:
        table = {
            code: {
                label: _figures_of(evaluation, code).get(figure.key)
                for label, evaluation in evaluations.items()
            }
            for code in (["mean"] * (len(codes) > 1) + sorted(codes, key=language_name))
        }
        measured: list[float] = [
            value for values in table.values() for value in values.values() if is_number(value)
        ]
        if set(measured) - {figure.trivial}:
            rows = [(code, compared(figure, v, max(measured))) for code, v in table.items()]
            found.append(Result(figure, rows))
    return found
