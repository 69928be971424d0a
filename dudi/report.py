"""A run folder as one self-contained HTML page: no scripts, no requests, light or dark.

Three steps: `collect` reads what the folder has, the chart functions turn numbers into coordinates
(`line_chart`) and shares (`bars`), and data/report.html.j2 draws them as inline SVG and HTML.
A file that is missing leaves its section out. A demo's folder, which holds several runs, works too.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from dudi.callbacks import METRICS_FILE, write_text
from dudi.verbalize import LANGUAGE_NAMES

FILES = ("run.json", METRICS_FILE, "evaluation.json", "summary.json")
DASH = "–"
POINTS = tuple[list[float], list[float]]  # steps and values
MAX_POINTS = 400  # of a drawn curve; more would only make the file larger
SAMPLES = 3  # of each language
MAX_TEXT = 600  # characters of a sample's text


class Figure(NamedTuple):
    """One measured quantity: how it is named, printed and judged."""

    key: str
    title: str
    unit: str
    digits: int
    lower_is_better: bool


FIGURES = (
    Figure("nll_per_char", "NLL per character", "nats", 3, True),
    Figure("nll_per_token", "NLL per token", "nats", 3, True),
    Figure("kl_to_teacher", "KL to teacher", "nats a token", 3, True),
    Figure("chrf", "chrF of greedy generations", "0 to 100", 1, False),
)
CURVES = (
    ("loss", "Total loss", "weighted sum of a run's own signals"),
    ("off_policy_loss", "Off-policy signal", "divergence from the teacher on references"),
    ("on_policy_loss", "On-policy signal", "divergence from the teacher on own samples"),
    ("preference_loss", "Preference signal", "references over own samples"),
    ("ce_loss", "Cross-entropy", "of the references"),
    ("entropy", "Entropy", "of the student's predictions"),
    ("eval_nll_per_char", "Held-out NLL", "per character, during training"),
)
MODELS = {  # what the demo's and a run's labels stand for
    "teacher": "what is learnt from",
    "warm": "the common start: cross-entropy from scratch",
    "sft": "on from there with cross-entropy alone",
    "dudi": "on from there with DuDi",
    "before": "the student before training",
    "after": "the student after training",
}
KEY_SETTINGS = (
    "model_name_or_path", "teacher_model_name_or_path", "dataset_name",
    "off_policy_weight", "off_policy_divergence", "on_policy_weight", "on_policy_divergence",
    "preference_weight", "reference", "preference_beta", "ce_weight", "beta", "temperature",
    "rollout_temperature", "learning_rate", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_prompt_length", "max_completion_length", "seed",
)  # fmt: skip


# ---- reading -----------------------------------------------------------------------------------


@dataclass
class Collected:
    """What a run folder holds; empty where it holds nothing."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by run; "" if single
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by run


def collect(run_dir: str | Path) -> Collected:
    """Read a run folder or a demo's folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without any of a run's files, or a file that cannot be parsed.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run_dir must be a folder, got {folder}, which is none")
    children = _children(folder)
    found = Collected(
        folder,
        info=_read_json(folder / "run.json"),
        metrics=_metrics(folder, children),
        evaluations=_read_json(folder / "evaluation.json"),
        summary=_read_json(folder / "summary.json"),
    )
    found.settings = _settings(found.info, children)
    if not (found.info or found.metrics or found.evaluations or found.summary):
        raise ValueError(f"run_dir must hold one of {', '.join(FILES)}, got {folder}")
    return found


def _children(folder: Path) -> dict[str, Path]:
    """Run folders inside a demo's folder, in the order in which they were begun."""
    runs = [p.parent for p in folder.glob("*/run.json")]
    begun = {run: str(_read_json(run / "run.json").get("started", "")) for run in runs}
    return {run.name: run for run in sorted(runs, key=lambda run: (begun[run], run.name))}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a last line that a killed run left unfinished is let go."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, must hold JSON: {error}") from error
    return records


def _metrics(folder: Path, children: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Log events by run: of the folder's own file, or of each run inside where it has none."""
    own = _read_metrics(folder / METRICS_FILE)
    if not own:
        inner = {name: _read_metrics(path / METRICS_FILE) for name, path in children.items()}
        return {name: records for name, records in inner.items() if records}
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in own:
        grouped[str(record.get("run", ""))].append(record)
    return dict(grouped)


def _settings(info: dict[str, Any], children: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Options by run."""
    if children:
        infos = {name: _read_json(path / "run.json") for name, path in children.items()}
    else:
        infos = {"": info}
    merged = {
        name: {**own.get("script", {}), **own.get("config", {})} for name, own in infos.items()
    }
    return {name: options for name, options in merged.items() if options}


# ---- printing numbers --------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """Fixed digits; an en dash for what could not be measured."""
    return f"{value:,.{digits}f}".replace("-", "−") if is_number(value) else DASH


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


def clipped(text: Any) -> str:
    text = str(text)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rstrip() + " …"


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
    kept = [(r["step"] + offset, r[key]) for r in records if is_number(r.get(key))]
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


def _cells(figure: Figure, values: dict[str, Any], longest: float) -> list[Cell]:
    trained = [v for label, v in values.items() if label != "teacher" and is_number(v)]
    best = (min if figure.lower_is_better else max)(trained) if len(trained) > 1 else None
    cells = []
    for label, value in values.items():
        share = 100 * max(value, 0) / longest if is_number(value) and longest else 0
        is_best = label != "teacher" and best is not None and value == best
        cells.append(Cell(number(value, figure.digits), round(share, 2), is_best))
    return cells


def results(evaluations: Mapping[str, dict[str, Any]]) -> list[Result]:
    """Every figure that was measured, by language and in the mean."""
    codes = {code for e in evaluations.values() for code in e.get("languages", {})}
    found = []
    for figure in FIGURES:
        table = {
            code: {
                label: (e.get("mean", {}) if code == "mean" else e["languages"].get(code, {})).get(
                    figure.key
                )
                for label, e in evaluations.items()
            }
            for code in (["mean"] * (len(codes) > 1) + sorted(codes, key=language_name))
        }
        measured = [v for values in table.values() for v in values.values() if is_number(v)]
        if any(measured):  # all 0: a teacher compared with itself
            rows = [(code, _cells(figure, v, max(measured))) for code, v in table.items()]
            found.append(Result(figure, rows))
    return found


def samples(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A few rows of each language, evenly spaced, with what each model wrote."""
    merged: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for label, evaluation in evaluations.items():
        for sample in evaluation.get("samples", []):
            row = merged[sample["language"]].setdefault(sample["row"], {**sample, "written": {}})
            row["written"][label] = clipped(sample["generation"])
            row["prompt"], row["reference"] = clipped(row["prompt"]), clipped(row["reference"])
    chosen = {}
    for language, by_row in sorted(merged.items(), key=lambda item: language_name(item[0])):
        rows = [by_row[row] for row in sorted(by_row)]
        few = min(SAMPLES, len(rows))
        chosen[language] = [rows[i * len(rows) // few] for i in range(few)]
    return chosen


# ---- the story ---------------------------------------------------------------------------------


def _mean(found: Collected, label: str, key: str) -> Any:
    value = found.evaluations.get(label, {}).get("mean", {}).get(key)
    return value if is_number(value) else None


def _pair(found: Collected) -> tuple[str, str] | None:
    """The two evaluations that the report compares: old, new."""
    for old, new in (("sft", "dudi"), ("before", "after")):
        if old in found.evaluations and new in found.evaluations:
            return old, new
    return None


def _over(found: Collected, label: str) -> str:
    languages = len(found.evaluations[label].get("languages", {}))
    return f", averaged over {languages} languages" if languages > 1 else ""


def _demo_headline(found: Collected) -> Markup | None:
    new, old = _mean(found, "dudi", "nll_per_char"), _mean(found, "sft", "nll_per_char")
    if new is None or old is None:
        return None
    side = "against" if new < old else "no better than"
    text = Markup(
        "DuDi reaches <b>{}</b> nats per character on held-out text, {} <b>{}</b> "
        "for cross-entropy alone from the same start ({}){}"
    ).format(number(new), side, number(old), percent(new, old), _over(found, "dudi"))
    new_kl, old_kl = _mean(found, "dudi", "kl_to_teacher"), _mean(found, "sft", "kl_to_teacher")
    if new_kl is None or old_kl is None:
        return text + "."
    joint = ", and is closer to" if new_kl < old_kl else ", and is not closer to"
    ends = "its teacher: a KL of <b>{}</b> against <b>{}</b>."
    return text + f"{joint} " + Markup(ends).format(number(new_kl), number(old_kl))


def _run_headline(found: Collected) -> Markup | None:
    before, after = (_mean(found, label, "nll_per_char") for label in ("before", "after"))
    steps = found.info.get("steps")
    opening = f"{count(steps)} steps" if is_number(steps) else "Training"
    if before is not None and after is not None:
        return Markup(
            "{} took held-out text from <b>{}</b> to <b>{}</b> nats per character ({}){}."
        ).format(
            opening, number(before), number(after), percent(after, before), _over(found, "after")
        )
    losses = [v for records in found.metrics.values() for v in curve(records, "loss", 0)[1]]
    if len(losses) > 1:
        return Markup("{} took the training loss from <b>{}</b> to <b>{}</b>.").format(
            opening, short(losses[0]), short(losses[-1])
        )
    return None


def headline(found: Collected) -> Markup:
    """What came of it, in one sentence; escaped."""
    told = _demo_headline(found) or _run_headline(found)
    if told is None and found.evaluations:
        label = next(iter(found.evaluations))
        value = number(_mean(found, label, "nll_per_char"))
        told = Markup("Held-out text costs <b>{}</b> <b>{}</b> nats per character{}.").format(
            label, value, _over(found, label)
        )
    return told or Markup("The run has logged no result yet.")


class Card(NamedTuple):
    name: str
    value: str
    note: str
    better: bool | None = None  # how the note is coloured


def _figure_cards(found: Collected, old: str, new: str) -> list[Card]:
    cards = []
    for figure in FIGURES:
        value, base = _mean(found, new, figure.key), _mean(found, old, figure.key)
        if figure.key == "nll_per_token" or value is None:
            continue
        if base is None or not base:
            cards.append(Card(figure.title, number(value, figure.digits), figure.unit))
            continue
        change = percent(value, base) if figure.lower_is_better else _points(value - base)
        better = None if value == base else (value < base) == figure.lower_is_better
        title = "chrF" if figure.key == "chrf" else figure.title
        note = f"{change} vs {old} {number(base, figure.digits)}"
        cards.append(Card(title, number(value, figure.digits), note, better))
    return cards


def _points(difference: float) -> str:
    return f"{difference:+.1f}".replace("-", "−")


def cards(found: Collected) -> list[Card]:
    """Key figures: the comparison's, then what the run was and cost."""
    pair, info = _pair(found), found.info
    shown = _figure_cards(found, *pair) if pair else []
    own, teacher = info.get("parameters"), info.get("teacher_parameters")
    if own and teacher:
        share = f"{100 * own / teacher:.0f} % of the teacher's {count(teacher)}"
        shown.append(Card("Student parameters", count(own), share))
    elif own:
        shown.append(Card("Parameters", count(own), ""))
    if is_number(info.get("steps")):
        each = "in each of sft and dudi" if "sft" in found.evaluations else ""
        shown.append(Card("Optimizer steps", count(info["steps"]), each))
    if is_number(info.get("seconds")):
        what = "the whole demo" if found.summary else "of training"
        shown.append(Card("Time", duration(info["seconds"]), what))
    return shown


def models(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the demo's table of models."""
    return [
        {"label": label, **values} for label, values in summary.items() if isinstance(values, dict)
    ]


def facts(found: Collected) -> list[tuple[str, str]]:
    """What was run, beside its settings."""
    info = found.info
    told = []
    if info.get("started"):
        told.append(("Started", moment(info["started"])))
    if info.get("languages"):
        told.append(("Languages", ", ".join(map(language_name, info["languages"]))))
    for split, counts in info.get("data", {}).items():
        parts = [f"{count(n)} {name.replace('_', ' ')}" for name, n in counts.items() if n]
        told.append((f"Data, {split}", ", ".join(parts)))
    if "seed" in found.summary:
        told.append(("Seed", str(found.summary["seed"])))
    told.append(("Folder", str(found.folder)))
    return told


class Settings(NamedTuple):
    runs: list[str]
    key: list[tuple[str, list[str]]]
    other: list[tuple[str, list[str]]]


def settings(by_run: Mapping[str, dict[str, Any]]) -> Settings:
    """Options, a column for each run: those that matter most, then the rest."""
    names = dict.fromkeys(name for options in by_run.values() for name in options)
    rows = {
        name: [option(o.get(name)) for o in by_run.values()]
        for name in [*(n for n in KEY_SETTINGS if n in names), *sorted(names)]
    }
    told = {name: texts for name, texts in rows.items() if set(texts) != {DASH}}
    return Settings(
        list(by_run),
        [(n, t) for n, t in told.items() if n in KEY_SETTINGS],
        [(n, t) for n, t in told.items() if n not in KEY_SETTINGS],
    )


# ---- the page ----------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dudi", "data"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, count=count, duration=duration, language=language_name, option=option
    )
    return environment


def render(found: Collected) -> str:
    """The page."""
    from dudi import __version__

    template = _environment().get_template("report.html.j2")
    return template.render(
        title=found.info.get("title") or found.folder.resolve().name,
        headline=headline(found),
        cards=cards(found),
        models=models(found.summary),
        about=MODELS,
        labels=list(found.evaluations),
        results=results(found.evaluations),
        charts=loss_charts(found.metrics),
        after_warm="warm" in found.metrics and len(found.metrics) > 1,
        samples=samples(found.evaluations),
        command=found.info.get("command"),
        facts=facts(found),
        settings=settings(found.settings),
        environment=found.info.get("environment", {}),
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
        version=__version__,
    )


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run folder or a demo's folder; by default to report.html inside it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without any of a run's files, or a file that cannot be parsed.
    """
    path = Path(run_dir) / "report.html" if output is None else Path(output)
    write_text(path, render(collect(run_dir)))
    return path
