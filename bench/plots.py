"""Plots of a session: time above the floor, workspace, and how both grow with N and V."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from bench.report import MB, Results, workspace

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "ours": "#c2410c", "ours-triton": "#fb923c", "dense": "#64748b", "trl": "#2563eb",
    "liger": "#0d9488", "orda": "#a855f7", "cut-cross-entropy": "#ca8a04", "torch": "#dc2626",
}  # fmt: skip


LONGEST = 6.0  # times the floor: longer bars are cut


def draw(results: Results, folder: Path) -> None:
    for shape in dict.fromkeys(shape for shape, _, _ in results.cases):
        cases = {(t, c): v for (s, t, c), v in results.cases.items() if s == shape}
        ratios = {key: case["ratio"] for key, case in cases.items() if "ratio" in case}
        spaces = {key: s / MB for key, case in cases.items() if (s := workspace(case)) is not None}
        if ratios:
            _bars(ratios, f"{shape}: time / bare GEMMs", folder / f"time-{shape}.png", floor=1.0)
        if spaces:
            _bars(spaces, f"{shape}: MB beyond gradients", folder / f"memory-{shape}.png")
    for axis in dict.fromkeys(axis for axis, _ in results.sweeps):
        curves = {c: points for (a, c), points in results.sweeps.items() if a == axis}
        _curves(axis, curves, folder / f"scaling-{axis}.png")


def _bars(
    values: dict[tuple[str, str], float], title: str, path: Path, floor: float | None = None
) -> None:
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.26 * len(values)))
    names = [f"{task} · {contender}" for task, contender in values]
    colours = [COLOURS.get(contender, "#94a3b8") for _, contender in values]
    most = LONGEST if floor else max(values.values())
    bars = axes.barh(names, [min(v, most) for v in values.values()], color=colours, height=0.7)
    told = [("%.2f" if floor else "%.0f") % v + " →" * (v > most) for v in values.values()]
    axes.bar_label(bars, told, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    if floor is not None:
        axes.axvline(floor, color="black", linewidth=0.8, linestyle="--")
    _save(figure, path)


def _curves(axis: str, curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for contender, points in curves.items():
        ordered = sorted(points, key=lambda point: point[axis])
        axes.loglog(
            [point[axis] for point in ordered],
            [point["seconds"] for point in ordered],
            marker="o",
            label=contender,
            color=COLOURS.get(contender, "black"),
        )
    ticks = sorted({point[axis] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_ylabel("seconds, forward + backward")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
