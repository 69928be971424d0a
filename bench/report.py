"""What a session measured: summary.json, a Markdown table, and plots where matplotlib is there."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MB = 1e6
HEADINGS = ("task", "contender", "s", "time / floor", "workspace, MB", "gradient error")


@dataclass
class Results:
    """Cases by (shape, task, contender); why others are absent; sweeps by (axis, contender)."""

    cases: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    absent: dict[tuple[str, str, str], str] = field(default_factory=dict)
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, shape: str, task: str, contender: str, values: dict[str, Any]) -> None:
        self.cases.setdefault((shape, task, contender), {}).update(values)


def environment() -> dict[str, Any]:
    from dudi.run import environment as versions

    found = {k: v for k, v in versions().items() if k != "os"} | {"system": platform.system()}
    for name in ("trl", "liger_kernel", "orda_kernel", "cut_cross_entropy"):
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
    """Markdown, a section for each shape."""
    lines = []
    shapes = dict.fromkeys(shape for shape, _, _ in results.cases)
    for shape in shapes:
        lines += [f"\n### {shape}\n", "| " + " | ".join(HEADINGS) + " |", "|---" * 6 + "|"]
        for (own, task, contender), case in results.cases.items():
            if own == shape:
                lines.append("| " + " | ".join(_cells(task, contender, case)) + " |")
        for (own, task, contender), why in results.absent.items():
            if own == shape and why != "has no such loss":
                lines.append(f"| {task} | {contender} | absent: {why} | | | |")
    return "\n".join(lines) + "\n"


def _cells(task: str, contender: str, case: dict[str, Any]) -> list[str]:
    space = workspace(case)
    return [
        task,
        f"**{contender}**" if contender == "ours" else contender,
        _spelt(case.get("seconds"), ".2f"),
        _spelt(case.get("ratio"), ".2f"),
        case.get("failed") or _spelt(None if space is None else space / MB, ",.0f"),
        _spelt(case.get("gradient_error"), ".1e"),
    ]


def _spelt(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_all(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment(),
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
    }
    (folder / "summary.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        from bench.plots import draw

        draw(results, folder)
