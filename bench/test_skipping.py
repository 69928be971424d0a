"""What `gradient_tolerance` leaves out on real distributions, and what it costs: SmolLM2-135M on
the embedded text, and its noisy copy as the student. FLOPs saved are those of a whole step: of the
gradient's GEMMs by *retain*, but for short gaps; of a projection of both sides, too, and with no
gaps, by *recompute* with tiles of as many rows.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.measure import Turns
from bench.problems import SMOLLM2, Problem, make
from bench.report import Results
from bench.smollm2 import absent
from dudi_kernels import linear_distill_loss, skipping
from dudi_kernels.api import DistillLoss

TOLERANCES = (1e-3, 3e-3, 1e-2)
RETAIN = 2 / 4  # of 3 G_s + G_t, where G_t = G_s
RECOMPUTE = 4 / 6  # of 4 G_s + 2 G_t


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all")
    metafunc.parametrize("rows", (128, 512) if everything else (128,))
    divergences = ("forward_kl", "reverse_kl") if everything else ("forward_kl",)
    metafunc.parametrize("divergence", divergences)


def test_skipping(
    divergence: str, rows: int, results: Results, dtype: torch.dtype, device: str, rounds: int
) -> None:
    """`rows` of text, which a tile has at the most."""
    if why := absent():
        pytest.skip(why)
    x = make(SMOLLM2, dtype, device).rows(rows)
    turns = Turns(
        {str(t): (lambda t=t: _step(x, divergence, t)) for t in (0.0, *TOLERANCES)},  # type: ignore[misc]
        device == "cuda",
    )
    assert not turns.warm_up()
    for _ in range(rounds):
        turns.take(*turns.steps)
    _, *exact = _step(x, divergence, 0.0)
    for tolerance in TOLERANCES:
        got, *found = _step(x, divergence, tolerance)
        ratios = [
            own / whole
            for own, whole in zip(turns.seconds[str(tolerance)], turns.seconds["0.0"], strict=True)
        ]
        share = float(got.skipped)
        with mock.patch.object(skipping, "GAP", 0):
            alone = float(_step(x, divergence, tolerance)[0].skipped)
        results.tables["gradient_tolerance"].append(
            {
                "divergence": divergence,
                "rows": rows,
                "tolerance": tolerance,
                "tiles skipped": alone,
                "but for gaps": share,
                "FLOPs saved, retain": RETAIN * share,
                "FLOPs saved, recompute": RECOMPUTE * alone,
                "dropped, at most": float(got.dropped),
                "error of hidden": _error(found[0], exact[0]),
                "error of weight": _error(found[1], exact[1]),
                "time / exact": sorted(ratios)[len(ratios) // 2],
            }
        )
        assert got.dropped <= tolerance


def _step(x: Problem, divergence: str, tolerance: float) -> tuple[DistillLoss, Tensor, Tensor]:
    """The results, and the gradients of hidden states and weight."""
    x.clear()
    got = linear_distill_loss(
        x.hidden,
        x.weight,
        x.teacher_hidden,
        x.teacher_weight,
        divergence=divergence,
        gradient_tolerance=tolerance,
    )
    got.loss.backward()
    assert x.hidden.grad is not None and x.weight.grad is not None
    return got, x.hidden.grad, x.weight.grad


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())
