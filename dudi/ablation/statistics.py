"""Means over seeds with 95 % intervals, and differences between methods that are paired twice: by
seed (the same warm start, the same data order) and by test row.

Two things vary: the seed, and which rows the test split happens to hold. With v_s the value of
seed s and S seeds,

    se^2 = var(v_s) / S  +  var over resampled rows of the mean over seeds

and the interval is value +- t se, with Satterthwaite's degrees of freedom. Rows are resampled by
group (all rows of a key, in all languages, together); seeds are not resampled: a bootstrap over
three understates. Of one seed nothing is known, and no interval is given. Both parts hold a little
of the interaction of seed and row, so that intervals are, if anything, wide. Nothing is corrected
for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dudi.evaluation.bootstrap import MEAN
from dudi.evaluation.figures import FIGURES, Figure
from dudi.intervals import LEVEL, Mean, t_quantile

RESAMPLES = 300
Rows = Sequence[Mapping[str, Any]]


class Values(NamedTuple):
    """Of one method, figure and language."""

    by_seed: dict[int, float]
    draws: dict[int, np.ndarray]  # of each seed, (RESAMPLES,), the same rows for all
    groups: int


def values_of(figure_name: str, by_seed: Mapping[int, Rows], salt: int = 0) -> dict[str, Values]:
    """By language, and the unweighted mean over these.

    Every call with the same groups draws the same rows, so that methods can be paired.
    """
    figure = FIGURES[figure_name]
    kept = {seed: [r for r in rows if figure.counts(r)] for seed, rows in by_seed.items()}
    groups = sorted({str(row["group"]) for rows in kept.values() for row in rows})
    if not groups:
        return {}
    random = np.random.default_rng(salt)
    count = len(groups)
    times = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    found = {seed: _of_seed(figure, rows, groups, times) for seed, rows in kept.items()}
    languages = sorted(set.intersection(*(set(own) for own in found.values())))
    return {
        language: Values(
            {seed: own[language][0] for seed, own in found.items()},
            {seed: own[language][1] for seed, own in found.items()},
            count,
        )
        for language in (*languages,)
    }


def _of_seed(
    figure: Figure, rows: Rows, groups: list[str], times: np.ndarray
) -> dict[str, tuple[float, np.ndarray]]:
    """Value and draws by language, and of their mean."""
    place = {group: i for i, group in enumerate(groups)}
    sums: dict[str, np.ndarray] = {}
    for row in rows:
        columns = np.asarray(figure.columns(row), float)
        own = sums.setdefault(row["language"], np.zeros((len(groups), len(columns))))
        own[place[str(row["group"])]] += columns
    found = {
        language: (float(figure.value(own.sum(0)[None])[0]), figure.value(times @ own))
        for language, own in sums.items()
    }
    value = float(np.mean([own[0] for own in found.values()]))
    with np.errstate(invalid="ignore"):
        draws = np.nanmean([own[1] for own in found.values()], axis=0)
    return {**found, MEAN: (value, draws)}


def estimate(values: Values) -> Mean:
    return _estimate(values.by_seed, values.draws, values.groups)


def difference(new: Values, old: Values) -> Mean:
    """New - old, over the seeds that both have."""
    seeds = sorted(new.by_seed.keys() & old.by_seed.keys())
    return _estimate(
        {seed: new.by_seed[seed] - old.by_seed[seed] for seed in seeds},
        {seed: new.draws[seed] - old.draws[seed] for seed in seeds},
        min(new.groups, old.groups),
    )


def _estimate(by_seed: Mapping[int, float], draws: Mapping[int, np.ndarray], groups: int) -> Mean:
    runs = tuple(by_seed.values())
    count = len(runs)
    if not count:
        return Mean(math.nan, math.nan, runs)
    value = float(np.mean(runs))
    if count == 1 or groups < 2:
        return Mean(value, math.nan, runs)
    of_seeds = float(np.var(runs, ddof=1)) / count
    of_rows = float(np.nanvar(np.mean(list(draws.values()), axis=0), ddof=1))
    total = of_seeds + of_rows
    if total == 0:
        return Mean(value, 0.0, runs)
    freedom = total**2 / (of_seeds**2 / (count - 1) + of_rows**2 / (groups - 1))
    return Mean(value, t_quantile(LEVEL, freedom) * math.sqrt(total), runs)
