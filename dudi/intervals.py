"""Means over a few runs, with half of a 95 % interval by Student's t: 1.850 ± 0.004.

`dudi ablate` has them over seeds, `dudi seahelm report` over SEA-HELM's runs. Intervals that rows
are resampled for (dudi/evaluation/bootstrap.py) are another thing: they have two unequal ends.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dudi.report_figures import DASH, number

LEVEL = 0.95
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)  # on [-1, 1]; 64: t to 1e-9
ITERATIONS = 100  # about ten are needed


class Mean(NamedTuple):
    """Over runs; half the width of its interval, NaN where too few of them tell of no spread."""

    value: float
    half: float
    runs: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out; False where there is none."""
        return abs(self.value) > self.half


def spelt(found: Mean | None, digits: int, signed: bool = False) -> str:
    """1.850 ± 0.004; the value alone where nothing is known of its spread, an en dash for none."""
    if found is None or not math.isfinite(found.value):
        return DASH
    value = number(found.value, digits, signed)
    return f"{value} ± {number(found.half, digits)}" if math.isfinite(found.half) else value


def or_none(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None


@lru_cache(maxsize=1024)
def t_quantile(level: float, freedom: float) -> float:
    """t with P(|T| < t) = level, for Student's distribution of `freedom` >= 1 degrees.

    With t = sqrt(freedom) tan(a) this is::

        integral of cos^(freedom - 1) over [0, a]  =  level x that over [0, pi / 2]

    whose left side is concave in a: Newton's steps from 0 come from below and never go too far.
    """
    whole = (
        math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    )
    angle = 0.0
    for _ in range(ITERATIONS):
        inner = np.cos(angle / 2 * (1 + NODES)) ** (freedom - 1)
        missing = level * whole - angle / 2 * float(WEIGHTS @ inner)
        step = missing / math.cos(angle) ** (freedom - 1)
        angle += step
        if abs(step) <= 1e-14 * angle:
            break
    return math.sqrt(freedom) * math.tan(angle)
