"""Learning rates and the cost of a step, from trials on the validation split.

Every tuned method gets the same rates, one seed that the report does not use, and the lowest NLL a
character after its last step. Ablations of DuDi try DuDi's rate and those next to it. Where the
best rate is an end of those tried, the next one beyond is tried, too, as often as the grid allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dudi.ablation.grid import START, Cell, Grid, Measured

SELECTED_BY = "nll_per_char"  # on the validation split
DIVERGED = "diverged"  # in the result of a trial whose loss did not stay finite: why

ResultOf = Callable[[Cell], dict[str, Any] | None]


class Sweep(NamedTuple):
    """The trials of a method by learning rate; None is to come."""

    results: dict[float, dict[str, Any] | None]

    @property
    def best(self) -> float | None:
        """None while trials are to come, and where all diverged."""
        values = {rate: math.nan if r is None else _value(r) for rate, r in self.results.items()}
        if any(map(math.isnan, values.values())):
            return None
        rate = min(values, key=values.__getitem__)
        return None if values[rate] == math.inf else rate

    def measured(self) -> Measured | None:
        if self.best is None:
            return None
        spent = sorted(
            r["seconds"] / r["cell"]["steps"]
            for r in self.results.values()
            if r is not None and DIVERGED not in r
        )
        return Measured(self.best, spent[len(spent) // 2], tuple(sorted(self.results)))


def _value(result: Mapping[str, Any]) -> float:
    """Smaller is better; infinite where the trial diverged."""
    return math.inf if DIVERGED in result else float(result["curve"][-1][SELECTED_BY])


def sweeps_of(grid: Grid, wanted: Sequence[Cell], result_of: ResultOf) -> dict[str, Sweep]:
    """The trials, done and to come, that these cells' learning rates and steps are known from.

    Those of methods that are tuned as another one begin where the other one's have ended.
    """
    if grid.tune is None:
        return {}
    rates = sorted(set(grid.tune.learning_rates))
    names = {cell.method for cell in wanted} - {START}
    tuned = {grid.method(name).tuned_as or name for name in names}
    tuned |= {s.seconds_of for c in wanted if (s := grid.settings[c.setting]).seconds_of}
    found = {n: _sweep(grid, n, rates, result_of) for n in grid.known if n in tuned}
    for name in (n for n in grid.known if n in names - tuned and grid.rate_of(n) == n):
        near = _near(found[str(grid.method(name).tuned_as)])
        if near:
            found[name] = _sweep(grid, name, near, result_of)
    return found


def _near(base: Sweep) -> list[float]:
    """The best rate and those next to it, once it is known."""
    if base.best is None:
        return []
    rates = sorted(base.results)
    i = rates.index(base.best)
    return rates[max(0, i - 1) : i + 2]


def _sweep(grid: Grid, name: str, rates: Sequence[float], result_of: ResultOf) -> Sweep:
    assert grid.tune is not None

    def result(rate: float) -> dict[str, Any] | None:
        return result_of(trial(grid, name, rate))

    sweep = Sweep({rate: result(rate) for rate in rates})
    for _ in range(grid.tune.beyond):
        rate = _beyond(grid.tune.learning_rates, sweep)
        if rate is None:
            break
        sweep.results[rate] = result(rate)
    return sweep


def _beyond(learning_rates: Sequence[float], sweep: Sweep) -> float | None:
    """The next rate outward where the best one is at an end: the next of the grid's, and beyond
    these as far again as its last two are apart."""
    ladder, best = sorted(set(learning_rates)), sweep.best
    if best is None or len(ladder) < 2:
        return None
    if best == max(sweep.results):
        higher = [rate for rate in ladder if rate > best]
        return higher[0] if higher else _rounded(best * ladder[-1] / ladder[-2])
    if best == min(sweep.results):
        lower = [rate for rate in ladder if rate < best]
        return lower[-1] if lower else _rounded(best * ladder[0] / ladder[1])
    return None


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def trial(grid: Grid, name: str, rate: float) -> Cell:
    assert grid.tune is not None
    return Cell(grid.tune.setting, name, grid.tune.seed, rate)


def trials_of(grid: Grid, sweeps: Mapping[str, Sweep]) -> list[Cell]:
    return [trial(grid, name, rate) for name, sweep in sweeps.items() for rate in sweep.results]


def trials_to_come(grid: Grid, sweeps: Mapping[str, Sweep]) -> list[Cell]:
    return [
        trial(grid, name, rate)
        for name, sweep in sweeps.items()
        for rate, result in sweep.results.items()
        if result is None
    ]


def measured_of(sweeps: Mapping[str, Sweep]) -> dict[str, Measured]:
    """By method: the rate of its best trial, and CPU seconds a step over all its trials."""
    found = {name: sweep.measured() for name, sweep in sweeps.items()}
    return {name: own for name, own in found.items() if own is not None}
