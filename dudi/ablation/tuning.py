"""Learning rates and the cost of a step, from trials on the validation split.

Every tuned method gets the same rates, one seed that the report does not use, and the lowest NLL a
character after its last step. Ablations of DuDi try DuDi's rate and those next to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dudi.ablation.cell import SELECTED_BY
from dudi.ablation.grid import Cell, Measured


def measured_of(results: Mapping[Cell, dict[str, Any]]) -> dict[str, Measured]:
    """By method: the rate of its best trial, and CPU seconds a step over all its trials."""
    best: dict[str, tuple[float, float]] = {}
    spent: dict[str, list[float]] = {}
    for cell, result in results.items():
        assert cell.trial is not None
        value = float(result["curve"][-1][SELECTED_BY])
        if math.isfinite(value):
            best[cell.method] = min(best.get(cell.method, (math.inf, 0.0)), (value, cell.trial))
        spent.setdefault(cell.method, []).append(result["seconds"] / result["cell"]["steps"])
    return {
        name: Measured(rate, sorted(spent[name])[len(spent[name]) // 2])
        for name, (_, rate) in best.items()
    }
