"""Means over runs, and Student's t beside tables of it and beside its density."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dudi.intervals import Mean, spelt, t_quantile


@pytest.mark.parametrize(
    ("level", "freedom", "want"),
    [
        (0.95, 1, 12.7062047), (0.95, 2, 4.3026527), (0.95, 5, 2.5705818), (0.95, 30, 2.0422725),
        (0.95, 100, 1.9839715), (0.99, 2, 9.9248432), (0.9, 10, 1.8124611), (0.95, 1e6, 1.9599664),
    ],
)  # fmt: skip
def test_quantiles_of_t_are_those_of_tables(level: float, freedom: float, want: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize("freedom", [1.3, 2.5, 7.75, 41.2])
def test_of_fractions_of_a_degree_too(freedom: float) -> None:
    """The density, summed up to t."""
    t, n = t_quantile(0.95, freedom), 100_000
    x = (np.arange(n) + 0.5) / n * t
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(math.pi * freedom)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert 2 * density.mean() * t == pytest.approx(0.95, abs=1e-8)


def test_a_mean_is_spelt_with_what_is_known_of_it() -> None:
    assert spelt(Mean(-1234.5678, 0.25, (0.0,)), 2) == "−1,234.57 ± 0.25"
    assert spelt(Mean(0.5, math.nan, (0.5,)), 3, signed=True) == "+0.500"
    assert spelt(Mean(math.nan, math.nan, ()), 3) == spelt(None, 3) == "–"
    assert Mean(-0.3, 0.2, ()).clear and not Mean(0.2, 0.3, ()).clear
    assert not Mean(5.0, math.nan, (5.0,)).clear
