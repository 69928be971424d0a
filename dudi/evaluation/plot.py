"""A comparison as a plot (matplotlib): a panel for each task and figure, intervals by result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dudi.evaluation.compare import Comparison
from dudi.evaluation.figures import FIGURES
from dudi.evaluation.tables import overall

FORMATS = (".png", ".svg", ".pdf")
COLUMNS = 4


def check_plot(path: str | Path) -> Path:
    """Raise before anything is computed what drawing would raise in the end."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot must end in one of {', '.join(FORMATS)}, got {str(path)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install 'dudi[eval]'") from None
    return path


def write_plot(comparison: Comparison, path: str | Path) -> Path:
    """Means over languages with their intervals; written whole or not at all."""
    path = check_plot(path)
    from matplotlib.figure import Figure

    panels = [(task, line) for task in comparison.tasks for line in overall(comparison, task)]
    rows = -(-len(panels) // COLUMNS)
    height = 0.9 + 0.3 * len(comparison.names)
    drawing = Figure(figsize=(3.4 * COLUMNS, max(1, rows) * height), layout="constrained")
    axes: Any = drawing.subplots(max(1, rows), COLUMNS, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (task, line) in zip(axes, panels, strict=False):
        _panel(ax, task, FIGURES[line.figure], line.values, comparison.names)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    drawing.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
    os.replace(temporary, path)
    return path


def _panel(ax: Any, task: str, figure: Any, values: Any, names: list[str]) -> None:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(figure.better, "")
    ax.set_title(f"{task}\n{figure.title}{arrow}", fontsize=8)
    for place, value in enumerate(values):
        ax.plot([value.low, value.high], [place, place], linewidth=2.5, color=f"C{place}")
        ax.plot([value.value], [place], "o", markersize=5, color=f"C{place}")
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="x", labelsize=7)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(axis="x", alpha=0.3)
