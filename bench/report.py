"""What a session measured, as summary.json and as tables in Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

import torch

from dudi_kernels.plan import DEFAULT_BUDGET

MB = 1e6
HEADINGS = ("task", "contender", "s", "time / floor", "workspace, MB", "gradient error")


@dataclass
class Results:
    """Cases by (shape, task, contender); why others are absent; sweeps by (axis, contender);
    tables of what has columns of its own."""

    cases: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    absent: dict[tuple[str, str, str], str] = field(default_factory=dict)
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    tables: dict[str, list[dict[str, Any]]] = field(  # by heading, of lines with the same columns
        default_factory=lambda: defaultdict(list)
    )

    def add(self, shape: str, task: str, contender: str, values: dict[str, Any]) -> None:
        self.cases.setdefault((shape, task, contender), {}).update(values)


def environment(device: str) -> dict[str, Any]:
    from dudi.run import environment as versions

    found = {k: v for k, v in versions().items() if k != "os"} | {"system": platform.system()}
    if device == "cpu":
        found["device"] = "cpu"  # whatever GPU is there
    else:
        found["cuda"] = torch.version.cuda
    for name in ("triton", "trl", "liger_kernel", "orda_kernel", "cut_cross_entropy"):
        found[name] = _version(name)
    return found | {"threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return None


def workspace(case: dict[str, Any]) -> float | None:
    """Peak bytes beyond the gradients, or None where it was not measured."""
    if "peak_bytes" not in case:
        return None
    return case["peak_bytes"] - case["gradient_bytes"]


def table(results: Results) -> str:
    """Markdown, a section for each shape; who has no figures is there with the reason."""
    lines = []
    for shape, tasks in _tasks(results).items():
        lines += [f"\n### {shape}\n", "| " + " | ".join(HEADINGS) + " |", "|---" * 6 + "|"]
        for task in tasks:
            for (own, other, contender), case in results.cases.items():
                if (own, other) == (shape, task):
                    lines.append("| " + " | ".join(_cells(task, contender, case)) + " |")
            for why, names in _absent(results, shape, task).items():
                lines.append(f"| {task} | {', '.join(names)} | {why} | | | |")
    return "\n".join(lines) + "\n"


def _tasks(results: Results) -> dict[str, list[str]]:
    """By shape, in the order of the session."""
    found: dict[str, list[str]] = {}
    for shape, task in dict.fromkeys((s, t) for s, t, _ in [*results.cases, *results.absent]):
        found.setdefault(shape, []).append(task)
    return found


def _absent(results: Results, shape: str, task: str) -> dict[str, list[str]]:
    """Contenders by the reason."""
    found: dict[str, list[str]] = {}
    for (own, other, contender), why in results.absent.items():
        if (own, other) == (shape, task):
            found.setdefault(why, []).append(contender)
    return found


# ---- what the project aims at --------------------------------------------------------------------

OURS = ("ours", "ours-triton")
TIME, SPEED, SPACE = "time / bare GEMMs", "speed / the fastest other's", "workspace / memory_budget"
BOTH, ERROR, SLOPE = "time / KD alone", "gradient error", "log-log slope of time"


class Target(NamedTuple):
    at_most: float | None = None
    at_least: float | None = None

    def verdict(self, value: float) -> str:
        high = self.at_most is not None and value > self.at_most
        low = self.at_least is not None and value < self.at_least
        return "missed" if high or low or math.isnan(value) else "met"

    def __str__(self) -> str:
        low = [] if self.at_least is None else [f">= {self.at_least:g}"]
        return ", ".join(low + ([] if self.at_most is None else [f"<= {self.at_most:g}"]))


TARGETS = {
    TIME: Target(at_most=1.25),  # in fp32
    SPEED: Target(at_least=1.4),
    SPACE: Target(at_most=1.1),
    BOTH: Target(at_most=1.15),
    ERROR: Target(at_most=1e-5),
    SLOPE: Target(at_least=0.9, at_most=1.1),
}
OWN_TIME = {  # the plain ones; and each logit made twice: 4 and 2 GEMMs for the floor's 3 and 1
    "forward_kl": Target(at_most=1.15),
    "reverse_kl": Target(at_most=1.15),
    "cross_entropy": Target(at_most=1.15),
    "rows": Target(at_most=2.0),
    "log_prob": Target(at_most=1.7),
}
THREE_SIGNALS_SPEED = Target(at_least=3.0)  # others need a call for each signal
ROUNDED_ERROR = Target(at_most=4e-3)  # bf16


def targets(results: Results) -> list[dict[str, Any]]:
    """Figures of ours that a reader asks for first, each beside what it should be."""
    found: list[dict[str, Any]] = []
    for (shape, task, name), case in results.cases.items():
        if name in OURS:
            for figure, value in _figures(results, shape, task, name).items():
                found.append(_line(shape, task, name, figure, value, _target(figure, task, case)))
    for (axis, name), points in results.sweeps.items():
        slope = _slope([(point[axis], point["seconds"]) for point in points])
        found.append(_line(f"over {axis}", "forward_kl", name, SLOPE, slope, TARGETS[SLOPE]))
    return found


def _figures(results: Results, shape: str, task: str, name: str) -> dict[str, float]:
    """Those that the session has."""
    case = results.cases[shape, task, name]
    here = {c: v for (s, t, c), v in results.cases.items() if (s, t) == (shape, task)}
    others = {c: v["ratio"] for c, v in here.items() if c not in OURS and "ratio" in v}
    found = {}
    if "ratio" in case:
        found[TIME] = case["ratio"]
        if others:
            found[SPEED] = min(others.values()) / case["ratio"]
        kd = results.cases.get((shape, "forward_kl", name), {}).get("ratio")
        if task == "three_signals" and kd:
            found[BOTH] = case["ratio"] / kd
    if (space := workspace(case)) is not None:
        found[SPACE] = space / DEFAULT_BUDGET
    if "gradient_error" in case:
        found[ERROR] = case["gradient_error"]
    return found


def _target(figure: str, task: str, case: dict[str, Any]) -> Target | None:
    in_fp32 = case.get("dtype") == "float32"
    if figure == TIME:
        return OWN_TIME.get(task, TARGETS[TIME]) if in_fp32 else None
    if figure == SPEED and task == "three_signals":
        return THREE_SIGNALS_SPEED
    if figure == ERROR and not in_fp32:
        return ROUNDED_ERROR
    return TARGETS[figure]


def _line(
    shape: str, task: str, contender: str, figure: str, value: float, target: Target | None
) -> dict[str, Any]:
    return {
        "shape": shape,
        "task": task,
        "contender": contender,
        "figure": figure,
        "value": None if math.isnan(value) else float(f"{value:.3g}"),
        "target": "" if target is None else str(target),
        "verdict": "" if target is None else target.verdict(value),
    }


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares in logarithms."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return linear_regression(xs, ys).slope if len(set(xs)) > 1 else math.nan


def target_table(results: Results) -> str:
    names = ("shape", "task", "contender", "figure", "value", "target", "verdict")
    lines = ["\n## Targets\n", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for line in targets(results):
        cells = (_spelt(v, ".3g") if k == "value" else v for k, v in line.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(task: str, contender: str, case: dict[str, Any]) -> list[str]:
    space = workspace(case)
    return [
        task,
        f"**{contender}**" if contender in OURS else contender,
        _spelt(case.get("seconds"), ".2f"),
        _spelt(case.get("ratio"), ".2f"),
        _spelt(None if space is None else space / MB, ",.0f"),
        _spelt(case.get("gradient_error"), ".1e"),
    ]


def own_tables(results: Results) -> str:
    text = ""
    for heading, found in results.tables.items():
        names = list(found[0])
        lines = [f"\n## {heading}\n", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        for line in found:
            cells = (format(v, ".3g") if isinstance(v, float) else str(v) for v in line.values())
            lines.append("| " + " | ".join(cells) + " |")
        text += "\n".join(lines) + "\n"
    return text


def _spelt(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def readme(results: Results, place: dict[str, Any]) -> str:
    """Markdown to paste: for each shape tasks down, contenders across."""
    device = place["cpu"] if place["device"] == "cpu" else place["device"]
    lines = [f"{device}, torch {place['torch']}; time / bare GEMMs, workspace in MB"]
    for shape, tasks in _tasks(results).items():
        names = dict.fromkeys(c for s, _, c in [*results.cases, *results.absent] if s == shape)
        lines += ["", "| " + " | ".join((shape, *names)) + " |", "|---" * (1 + len(names)) + "|"]
        for task in tasks:
            cells = (_short(results, (shape, task, name)) for name in names)
            lines.append("| " + " | ".join((task, *cells)) + " |")
    return "\n".join(lines) + "\n"


def _short(results: Results, key: tuple[str, str, str]) -> str:
    case = results.cases.get(key, {})
    if "ratio" not in case:
        return results.absent.get(key, "")
    space = workspace(case)
    return f"{case['ratio']:.2f}" + (f", {space / MB:,.0f}" if space is not None else "")


def write_all(results: Results, folder: Path, device: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    place = environment(device)
    content = {
        "environment": place,
        "targets": targets(results),
        "cases": [
            {"shape": shape, "task": task, "contender": contender, **case}
            for (shape, task, contender), case in results.cases.items()
        ],
        "absent": [
            {"shape": shape, "task": task, "contender": contender, "reason": why}
            for (shape, task, contender), why in results.absent.items()
        ],
        "sweeps": [
            {"axis": axis, "contender": contender, "points": points}
            for (axis, contender), points in results.sweeps.items()
        ],
        "tables": results.tables,
    }
    (folder / "summary.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "table.md").write_text(
        table(results) + target_table(results) + own_tables(results), encoding="utf-8"
    )
    (folder / "readme.md").write_text(readme(results, place), encoding="utf-8")
