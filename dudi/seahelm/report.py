"""`dudi seahelm report`: results of one or several models as a table, JSON, Markdown and HTML.

All four are made of the same lines: SEA, each language, its competencies, their tasks; a column a
model, "mean +- half the interval". data/seahelm.html.j2 is the page: no scripts, no requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from dudi.callbacks import write_text
from dudi.intervals import Mean, or_none, spelt
from dudi.page import page
from dudi.report_figures import DASH, language_name, number
from dudi.seahelm.facts import facts
from dudi.seahelm.scores import SEA, Model, Node, collect
from dudi.verbalize import ALIASES

FORMATS = ("json", "md", "html")


class Line(NamedTuple):
    """A line of the report: what it is of, and each model's cell."""

    node: Node
    title: str
    cells: list[str]
    shares: list[float]  # of 100, for bars
    best: list[bool]


def _title(node: Node) -> str:
    if node == SEA:
        return "SEA"
    return language_name(ALIASES.get(node[0], node[0])) if len(node) == 1 else node[-1]


def cell(found: Mean | None) -> str:
    """mean, and half the interval where there is one."""
    return spelt(found, 1)


def lines(models: Sequence[Model]) -> list[Line]:
    """Depth first: SEA, then each language with what it is made of."""
    nodes = {SEA: None} if any(SEA in m.nodes for m in models) else {}
    languages = dict.fromkeys(code for m in models for code in m.languages)
    for code in languages:
        _descend(models, (code,), nodes)
    return [_line(node, [m.nodes.get(node) for m in models]) for node in nodes]


def _descend(models: Sequence[Model], node: Node, nodes: dict[Node, None]) -> None:
    nodes[node] = None
    for child in dict.fromkeys(child for m in models for child in m.children(node)):
        _descend(models, child, nodes)


def _line(node: Node, found: list[Mean | None]) -> Line:
    means = [e.value for e in found if e is not None]
    return Line(
        node,
        _title(node),
        [cell(e) for e in found],
        [0.0 if e is None else round(min(e.value, 100.0), 2) for e in found],
        [e is not None and min(means) < max(means) == e.value for e in found],
    )


# ---- JSON ----------------------------------------------------------------------------------------


def to_dict(models: Sequence[Model]) -> dict[str, Any]:
    known = facts()
    return {
        "seahelm": {name: known[name] for name in ("repository", "version", "commit")},
        "interval": "95 %, Student's t over runs",
        "models": [_model_dict(model) for model in models],
    }


def _mean_dict(found: Mean | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.value, "half_width": or_none(found.half), "runs": list(found.runs)}


def _model_dict(model: Model) -> dict[str, Any]:
    return {
        "model": model.name,
        "runs": [
            {"run": run.number, "seed": run.seed, "seahelm": run.commit, "file": str(run.file)}
            for run in model.runs
        ],
        "sea": _mean_dict(model.nodes.get(SEA)),
        "recorded_total": model.recorded(""),
        "languages": {
            code: {
                **_tree_dict(model, (code,), "competencies"),
                "recorded_total": model.recorded(code),
            }
            for code in model.languages
        },
        "notes": model.notes,
    }


def _tree_dict(model: Model, node: Node, below: str = "tasks") -> dict[str, Any]:
    told = _mean_dict(model.nodes[node]) or {}
    key = (node[0], node[-1])
    if key in model.scores:
        score, plain = model.scores[key], model.plain[key]
        told |= {"score": plain.value, "baseline": score.baseline, "max": score.maximum}
    children = model.children(node)
    return told | (
        {below: {child[-1]: _tree_dict(model, child) for child in children}} if children else {}
    )


# ---- terminal and Markdown -----------------------------------------------------------------------


def table(models: Sequence[Model], depth: int = 2) -> Table:
    """SEA, languages and competencies; tasks too with depth 4."""
    told = Table("", *(Column(m.name, justify="right") for m in models))
    for line in lines(models):
        if len(line.node) <= depth:
            name = "  " * max(len(line.node) - 1, 0) + line.title
            style = "bold" if len(line.node) < 2 else None
            told.add_row(name, *line.cells, style=style, end_section=line.node == SEA)
    return told


def markdown(models: Sequence[Model]) -> str:
    """One table with every line, and what must be known beside it."""
    head = ["|  | " + " | ".join(m.name for m in models) + " |", "|---" * (len(models) + 1) + "|"]
    body = []
    for line in lines(models):
        indent = "&nbsp;" * 3 * max(len(line.node) - 1, 0)
        strong = "**" if len(line.node) < 2 else ""
        cells = [f"{strong}{text}{strong}" for text in line.cells]
        body.append(f"| {indent}{strong}{line.title}{strong} | " + " | ".join(cells) + " |")
    notes = [f"- {text}" for text in remarks(models)]
    return "\n".join(["# SEA-HELM", "", *head, *body, "", *notes, ""])


def remarks(models: Sequence[Model]) -> list[str]:
    """How to read the figures, and what is wrong with them."""
    known = facts()
    told = [
        f"Scores from 0 (chance, or nothing) to 100, as SEA-HELM {known['version']} normalises "
        "them; mean ± half of the 95 % interval over runs.",
    ]
    for model in models:
        told.append(f"{model.name}: {_runs(model)}.")
        told += [f"{model.name}: {note}." for note in model.notes]
    if len({frozenset(m.scores) for m in models}) > 1:
        told.append("The models were not asked the same tasks: their averages do not compare.")
    return told


def _runs(model: Model) -> str:
    seeds = ", ".join("unknown" if r.seed is None else str(r.seed) for r in model.runs)
    what = "1 run, seed" if len(model.runs) == 1 else f"{len(model.runs)} runs, seeds"
    return f"{what} {seeds}"


# ---- HTML and the files --------------------------------------------------------------------------


def baselines(models: Sequence[Model]) -> list[tuple[str, str, list[str]]]:
    """Language, task, and baseline -> maximum of each model's score."""
    keys = dict.fromkeys(key for m in models for key in m.scores)
    return [(code, name, [_range(m, (code, name)) for m in models]) for code, name in keys]


def _range(model: Model, key: tuple[str, str]) -> str:
    if key not in model.scores:
        return DASH
    score = model.scores[key]
    return f"{number(model.plain[key].value, 2)} in {score.baseline:.4g} … {score.maximum:g}"


def headline(models: Sequence[Model]) -> str:
    found = [m for m in models if SEA in m.nodes]
    if not found:
        return "Languages outside of the SEA average."
    n = len([code for code in found[0].languages if code in facts()["sea_languages"]])
    told = ", ".join(f"{m.name} {cell(m.nodes[SEA])}" for m in found)
    return f"SEA average over {n} language{'s' if n != 1 else ''}: {told}."


def render(models: Sequence[Model]) -> str:
    """The page."""
    shown = lines(models)
    return page(
        "seahelm.html.j2",
        {},
        headline=headline(models),
        models=[m.name for m in models],
        overview=[line for line in shown if len(line.node) < 2],
        languages=[
            (line, [other for other in shown if other.node[:1] == line.node and other != line])
            for line in shown
            if len(line.node) == 1
        ],
        remarks=remarks(models),
        baselines=baselines(models),
        seahelm=facts(),
    )


def write_reports(models: Sequence[Model], output_dir: str | Path) -> list[Path]:
    """seahelm.json, seahelm.md and seahelm.html in a folder."""
    texts = {
        "json": json.dumps(to_dict(models), indent=1, ensure_ascii=False),
        "md": markdown(models),
        "html": render(models),
    }
    paths = [Path(output_dir) / f"seahelm.{suffix}" for suffix in FORMATS]
    for path, suffix in zip(paths, FORMATS, strict=True):
        write_text(path, texts[suffix])
    return paths


def run_report(
    results: Iterable[str | Path],
    *,
    output_dir: str | Path | None = None,
    tasks: bool = False,
    console: Console | None = None,
) -> list[Model]:
    """`dudi seahelm report`: print the table; with `output_dir`, write the three files.

    Raises:
        FileNotFoundError: no such place.
        ValueError: a place without a finished run, or a file that does not fit.
    """
    console = console or Console()
    if output_dir is not None and Path(output_dir).is_file():
        raise ValueError(f"output_dir must be a folder, got the file {str(output_dir)!r}")
    places = list(results)
    if not places:
        raise ValueError("results must be given: folders that SEA-HELM wrote, or result files")
    models = collect(places)
    console.print(table(models, depth=4 if tasks else 2))
    for text in remarks(models):
        console.print(text, markup=False, highlight=False)
    if output_dir is not None:
        for path in write_reports(models, output_dir):
            console.print(str(path), soft_wrap=True)
    return models
