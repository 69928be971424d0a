"""Which learning rates are tried, and which one is taken."""

from __future__ import annotations

from typing import Any

import pytest

from dudi.ablation.grid import Cell, Grid, Measured, read_grid, resolved
from dudi.ablation.results import rate_told
from dudi.ablation.tuning import DIVERGED, SELECTED_BY, Sweep, measured_of, sweeps_of, trials_of

RATES = [3e-5, 1e-4, 5e-4, 2e-3, 6e-3]  # the standard grid's
WANTED = [Cell("main", "no_context", 0), Cell("other_tokenizer", "no_vocabulary", 0)]


def result(value: float) -> dict[str, Any]:
    return {"curve": [{SELECTED_BY: value}], "seconds": 50.0, "cell": {"steps": 100}}


class Trials:
    """Results as they would come: each method's NLL is lowest at its `best`."""

    def __init__(self, best: dict[str, float], beyond: int = 2, diverging: float = 1.0) -> None:
        grid = read_grid("configs/ablation.yaml").model_dump(exclude_unset=True)
        grid["tune"] |= {"beyond": beyond}
        self.grid, self.best, self.diverging = Grid.model_validate(grid), best, diverging
        self.done: dict[Cell, dict[str, Any]] = {}
        self.tried: list[list[float | None]] = []

    def round(self) -> bool:
        """Whether there was anything to try."""
        cells = trials_of(self.grid, sweeps_of(self.grid, WANTED, self.done.get))
        new = [cell for cell in cells if cell not in self.done]
        self.done |= {cell: self.run(cell) for cell in new}
        self.tried += [[cell.trial for cell in new]] if new else []
        return bool(new)

    def run(self, cell: Cell) -> dict[str, Any]:
        assert cell.trial is not None
        if cell.trial >= self.diverging:
            return {DIVERGED: "step 3"}
        return result(abs(cell.trial - self.best[cell.method]))

    def measured(self) -> dict[str, Measured]:
        while self.round():
            pass
        return measured_of(sweeps_of(self.grid, WANTED, self.done.get))


def test_ablations_try_the_rates_next_to_dudi_s() -> None:
    """But the one that the setting of the trials has not, which takes DuDi's."""
    trials = Trials({"dudi": 2e-3, "no_context": 5e-4})
    assert trials.round() and trials.round()
    assert trials.tried == [RATES, [5e-4, 2e-3, 6e-3]]
    assert trials.round() and trials.tried[2] == [1e-4]  # 5e-4 was an end of these three
    assert not trials.round()
    measured = trials.measured()
    assert {n: (m.learning_rate, m.end) for n, m in measured.items()} == {
        "dudi": (2e-3, ""),
        "no_context": (5e-4, ""),
    }
    rates = [resolved(trials.grid, c, measured)["options"]["learning_rate"] for c in WANTED]
    assert rates == [5e-4, 2e-3]
    with pytest.raises(KeyError):
        resolved(trials.grid, WANTED[0], {"dudi": measured["dudi"]})


@pytest.mark.parametrize(
    ("best", "beyond", "rounds"),
    [
        (6e-3, 2, [RATES, [0.018]]),
        (0.02, 2, [RATES, [0.018], [0.054]]),
        (1.0, 2, [RATES, [0.018], [0.054]]),
        (1.0, 0, [RATES]),
        (0.0, 2, [RATES, [9e-6], [2.7e-6]]),
    ],
)
def test_a_sweep_goes_on_beyond_its_ends(
    best: float, beyond: int, rounds: list[list[float]]
) -> None:
    trials = Trials({"dudi": best, "no_context": 2e-3}, beyond)
    measured = trials.measured()["dudi"]
    assert trials.tried[: len(rounds)] == rounds
    tried = [rate for own in rounds for rate in own]
    assert measured.learning_rate == min(tried, key=lambda rate: abs(rate - best))
    assert measured.tried == tuple(sorted(tried)) and measured.seconds_a_step == 0.5
    assert measured.end == {6e-3: "", 0.02: "", 1.0: "highest", 0.0: "lowest"}[best]


def test_a_trial_that_diverges_is_the_worst() -> None:
    trials = Trials({"dudi": 1.0, "no_context": 1.0}, diverging=0.01)
    assert {m.learning_rate for m in trials.measured().values()} == {6e-3}
    assert trials.tried[:2] == [RATES, [0.018]] and trials.measured()["dudi"].end == ""
    none = Trials({"dudi": 1.0}, diverging=0.0)
    assert none.measured() == {} and none.tried == [RATES]
    assert Sweep({1e-3: None, 1e-2: result(1.0)}).best is None  # one is to come


def test_a_rate_at_an_end_of_the_sweep_is_marked() -> None:
    grid = read_grid("configs/ablation.yaml")
    told = [rate_told(grid, Measured(rate, 1.0, (3e-5, 2e-3, 6e-3))) for rate in (3e-5, 2e-3, 6e-3)]
    assert told == ["3e-05 (the lowest tried)", "0.002", "0.006 (the highest tried)"]
    assert rate_told(grid, Measured(2e-3, 1.0, (2e-3,))) == "0.002"
