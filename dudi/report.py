"""A run folder as one self-contained HTML page: no scripts, no requests, light or dark.

`collect` (report_read.py) reads what the folder has, report_figures.py turns it into figures, and
this file tells the story: a headline, key figures, samples, what was run. data/report.html.j2 is
the page. A file that is missing leaves its section out; a demo's folder works too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from dudi.callbacks import write_text
from dudi.page import page
from dudi.report_figures import (
    BOTTOM,
    DASH,
    FIGURES,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    compared,
    count,
    curve,
    duration,
    is_number,
    language_name,
    loss_charts,
    moment,
    number,
    option,
    percent,
    results,
    short,
)
from dudi.report_read import Collected, collect

SAMPLES = 3  # of each language
MAX_TEXT = 600  # characters of a sample's text
MODELS = {  # what the demo's and a run's labels stand for
    "teacher": "what is learnt from",
    "warm": "the common start: cross-entropy from scratch",
    "sft": "on from there with cross-entropy alone",
    "dudi": "on from there with DuDi",
    "no_context": "the same without the context verbalizer",
    "lexicon": "the same with a lexicon in the vocabulary verbalizer",
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
        each = "in each run from the warm start" if "sft" in found.evaluations else ""
        shown.append(Card("Optimizer steps", count(info["steps"]), each))
    if is_number(info.get("seconds")):
        what = "the whole demo" if found.summary else "of training"
        shown.append(Card("Time", duration(info["seconds"]), what))
    return shown


def models(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the demo's table of models: what each is and cost, and its mean figures as cells."""
    named = {label: values for label, values in summary.items() if isinstance(values, dict)}
    means = {label: values.get("mean", {}) for label, values in named.items()}
    columns = [compared(f, {label: m.get(f.key) for label, m in means.items()}) for f in FIGURES]
    costs = ("parameters", "optimizer_steps", "seconds")
    return [
        {"label": label, "cells": cells, **{name: named[label].get(name) for name in costs}}
        for label, *cells in zip(named, *columns, strict=True)
    ]


def facts(found: Collected) -> list[tuple[str, str]]:
    """What was run, beside its settings."""
    info = found.info
    told = []
    if info.get("started"):
        told.append(("Started", moment(info["started"])))
    if info.get("languages"):
        told.append(("Languages", ", ".join(sorted(map(language_name, info["languages"])))))
    for split, counts in info.get("data", {}).items():
        parts = [f"{count(n)} {name.replace('_', ' ')}" for name, n in counts.items() if n]
        told.append((f"Data, {split}", ", ".join(parts)))
    if "seed" in found.summary:
        told.append(("Seed", str(found.summary["seed"])))
    if isinstance(vocabulary := info.get("vocabulary"), dict):
        told.append(("Vocabularies", str(vocabulary.get("map"))))
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


def clipped(text: Any) -> str:
    text = str(text)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rstrip() + " …"


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


# ---- the page ----------------------------------------------------------------------------------


def render(found: Collected) -> str:
    """The page."""
    filters = {
        "number": number,
        "count": count,
        "duration": duration,
        "language": language_name,
        "option": option,
    }
    return page(
        "report.html.j2",
        filters,
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
    )


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run folder or a demo's folder; by default to report.html inside it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without any of a run's files, or a file that cannot be parsed.
    """
    path = Path(run_dir) / "report.html" if output is None else Path(output)
    if path.is_dir():
        raise ValueError(f"output must be a file, got the folder {str(path)!r}")
    write_text(path, render(collect(run_dir)))
    return path
