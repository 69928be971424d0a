"""Confidence intervals by resampling rows: seeded, by language, paired between runs.

A resample draws groups of rows (a row by itself unless a task groups them) with replacement within
each language; the mean over languages is taken within a resample. Two runs over the same rows get
the same draws, so that differences are those of the same resampled rows.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dudi.evaluation.figures import Figure

RESAMPLES = 1000
LEVEL = 0.95
MEAN = "mean"  # the label of the unweighted mean over languages
AT_ONCE = 4_000_000  # drawn numbers held at a time


class Estimate(NamedTuple):
    """A figure and its 95 % percentile interval; NaN where it could not be measured."""

    value: float
    low: float
    high: float


class Sampled(NamedTuple):
    """A figure of a language's rows, and of each resample of them."""

    value: float
    draws: np.ndarray  # (resamples,)
    groups: int  # that are drawn from; of a mean, the fewest of a language

    def estimate(self) -> Estimate:
        return Estimate(self.value, *interval(self.draws))


def interval(draws: np.ndarray) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sampled(
    figure: Figure, rows: Sequence[Mapping[str, Any]], seed: int, resamples: int = RESAMPLES
) -> dict[str, Sampled]:
    """By language, and the mean over them; languages without a row that counts are left out."""
    by_language: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for row in rows:
        if figure.counts(row):
            columns = np.asarray(figure.columns(row), float)
            groups = by_language[row["language"]]
            groups[row["group"]] = groups.get(row["group"], 0) + columns
    found = {
        language: _of_language(figure, np.stack(list(groups.values())), seed, language, resamples)
        for language, groups in sorted(by_language.items())
    }
    if found:
        found[MEAN] = Sampled(
            float(np.mean([own.value for own in found.values()])),
            np.mean([own.draws for own in found.values()], axis=0),
            min(own.groups for own in found.values()),
        )
    return found


def _of_language(
    figure: Figure, columns: np.ndarray, seed: int, language: str, resamples: int
) -> Sampled:
    value = float(figure.value(columns.sum(0)[None])[0])
    random = np.random.default_rng([seed, zlib.crc32(language.encode())])
    count = len(columns)
    draws = []
    step = max(1, AT_ONCE // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        times = random.multinomial(count, np.full(count, 1 / count), size=size)
        draws.append(figure.value(times @ columns))
    return Sampled(value, np.concatenate(draws), count)


def difference(new: Sampled, old: Sampled) -> Estimate:
    """New - old, with the interval of the differences of paired resamples."""
    return Estimate(new.value - old.value, *interval(new.draws - old.draws))
