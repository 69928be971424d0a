"""Confidence intervals by resampling rows: seeded, by language, paired between runs.

A resample draws groups of rows (a row by itself unless a task groups them) with replacement: within
a language, or within all languages that share groups, so that a group's rows come together in each
of them. The mean over languages is taken within a resample. Two runs over the same rows get the
same draws, so that differences are those of the same resampled rows.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dudi.evaluation.figures import Figure
from dudi.intervals import LEVEL

RESAMPLES = 1000
MEAN = "mean"  # the label of the unweighted mean over languages
AT_ONCE = 4_000_000  # drawn numbers held at a time


class Estimate(NamedTuple):
    """A figure and its 95 % percentile interval; NaN where it could not be measured, the interval
    also where there is but one group of rows."""

    value: float
    low: float
    high: float


class Sampled(NamedTuple):
    """A figure of a language's rows, and of each resample of them."""

    value: float
    draws: np.ndarray  # (resamples,)
    groups: int  # that are drawn from; of a mean, the fewest of a language

    def estimate(self) -> Estimate:
        return Estimate(self.value, *interval(self.draws, self.groups))


def interval(draws: np.ndarray, groups: int) -> tuple[float, float]:
    """NaN where nothing is drawn: one group's resamples are all the same."""
    finite = draws[np.isfinite(draws)]
    if groups < 2 or not len(finite):
        return math.nan, math.nan
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
    found = {}
    for languages, names in _strata(by_language):
        placed = {code: _placed(names, by_language[code]) for code in languages}
        drawn = _of_stratum(figure, placed, [seed, zlib.crc32(languages[0].encode())], resamples)
        for code in languages:
            value = float(figure.value(placed[code].sum(0)[None])[0])
            found[code] = Sampled(value, drawn[code], len(by_language[code]))
    found = dict(sorted(found.items()))
    if found:
        found[MEAN] = Sampled(
            float(np.mean([own.value for own in found.values()])),
            np.mean([own.draws for own in found.values()], axis=0),
            min(own.groups for own in found.values()),
        )
    return found


def _strata(
    by_language: Mapping[str, Mapping[str, np.ndarray]],
) -> list[tuple[list[str], list[str]]]:
    """Languages that share groups, directly or through others, with all of their groups."""
    strata: list[tuple[set[str], dict[str, None]]] = []
    for language in sorted(by_language):
        languages, names = {language}, dict.fromkeys(by_language[language])
        for other in [own for own in strata if own[1].keys() & names.keys()]:
            strata.remove(other)
            languages, names = other[0] | languages, other[1] | names
        strata.append((languages, names))
    return [(sorted(languages), list(names)) for languages, names in strata]


def _placed(names: Sequence[str], groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """(groups of the stratum, S): zeros where the language has none of a group's rows."""
    nothing = np.zeros_like(next(iter(groups.values())))
    return np.stack([groups.get(name, nothing) for name in names])


def _of_stratum(
    figure: Figure, columns: Mapping[str, np.ndarray], seed: list[int], resamples: int
) -> dict[str, np.ndarray]:
    """The figure of each language in each resample of groups, the same resamples for all."""
    random = np.random.default_rng(seed)
    count = len(next(iter(columns.values())))
    draws: dict[str, list[np.ndarray]] = {code: [] for code in columns}
    step = max(1, AT_ONCE // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        times = random.multinomial(count, np.full(count, 1 / count), size=size)
        for code, own in columns.items():
            draws[code].append(figure.value(times @ own))
    return {code: np.concatenate(own) for code, own in draws.items()}


def difference(new: Sampled, old: Sampled) -> Estimate:
    """New - old, with the interval of the differences of paired resamples."""
    groups = min(new.groups, old.groups)
    return Estimate(new.value - old.value, *interval(new.draws - old.draws, groups))
