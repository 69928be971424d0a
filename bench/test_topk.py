"""What a step costs with a teacher that is known by its likeliest tokens (k = 64): in one sweep, as
`linear_dudi_loss` makes it, and in a sweep for each divergence and one for the rest; both beside
one with the teacher's states and head, whose projection the tokens save. In seconds of the CPU, of
all threads; on a GPU in its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import selection
from bench.measure import Turns, summary
from bench.problems import SMOLLM2, TINY, Problem, make
from bench.report import Results
from dudi_kernels import TopKTeacher, linear_distill_loss, linear_dudi_loss

K = 64
SHAPE = replace(SMOLLM2, name="smollm2-drawn")  # needs no package
OFF, ON = "forward_kl", "reverse_kl"  # of y+ and y-
SIGNALS: dict[str, dict[str, Any]] = {
    "both divergences": {"preference_weight": 0.0, "ce_weight": 0.0},
    "and preference, cross-entropy": {"preference_weight": 0.1, "ce_weight": 0.2},
}
Step = Callable[[], Tensor]


def known(x: Problem) -> TopKTeacher:
    """The likeliest tokens of the problem's teacher."""
    parts = []
    for hidden in x.teacher_hidden.split(64):
        log_p = (hidden @ x.teacher_weight.t()).float().log_softmax(-1)
        parts.append(log_p.topk(K))
    return TopKTeacher(
        torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
    )


def three(x: Problem, top: TopKTeacher, weights: dict[str, Any]) -> dict[str, Step]:
    named: dict[str, Any] = {"off_policy_divergence": OFF, "on_policy_divergence": ON}

    def whole(teacher: Tensor | TopKTeacher, head: Tensor | None) -> Tensor:
        return linear_dudi_loss(
            x.hidden, x.weight, teacher, head, x.targets, x.segments, **weights, **named
        ).loss

    def apart() -> Tensor:
        loss = x.hidden.new_zeros(())
        for side, divergence in enumerate((OFF, ON)):
            rows = (x.segments % 2 == side).nonzero().squeeze(1)
            part = TopKTeacher(top.ids[rows], top.log_probs[rows])
            got = linear_distill_loss(x.hidden[rows], x.weight, part, divergence=divergence)
            loss = loss + got.loss
        if not any(weights.values()):
            return loss
        none: dict[str, Any] = {"off_policy_weight": 0.0, "on_policy_weight": 0.0}
        rest = linear_dudi_loss(
            x.hidden, x.weight, None, None, x.targets, x.segments, **weights, **none
        )
        return loss + rest.loss

    return {
        "live": partial(whole, x.teacher_hidden, x.teacher_weight),
        "one sweep": partial(whole, top, None),
        "apart": apart,
    }


@pytest.mark.parametrize("signals", SIGNALS, ids=("divergences", "all"))
def test_topk(
    signals: str,
    results: Results,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    pytestconfig: pytest.Config,
) -> None:
    """Forward and backward."""
    x = make(TINY if selection(pytestconfig)["quick"] else SHAPE, dtype, device)
    losses = three(x, known(x), SIGNALS[signals])

    def step(name: str) -> None:
        x.clear()
        losses[name]().backward()

    turns = Turns(
        {name: partial(step, name) for name in losses}, device == "cuda", time.process_time
    )
    assert not turns.warm_up()
    torch.testing.assert_close(losses["one sweep"](), losses["apart"](), rtol=1e-3, atol=1e-3)
    for _ in range(rounds):
        turns.take(*turns.steps)
    live, one, apart = (turns.seconds[name] for name in ("live", "one sweep", "apart"))
    results.tables[f"a teacher's {K} likeliest tokens"].append(
        {
            "signals": signals,
            "rows": len(x.hidden),
            "live, s": summary(live, live).seconds,
            "one sweep / live": summary(one, live).ratio,
            "apart / live": summary(apart, live).ratio,
            "one sweep / apart": summary(one, apart).ratio,
        }
    )
