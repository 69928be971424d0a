"""Training in fp16 as PyTorch's documentation has it: autocast, a GradScaler, and its steps.

The gradient of the loss is faint enough for fp16 to lose it, so the scale has to reach it early.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import error, make_side, make_targets
from torch import Tensor, nn

from dudi_kernels import LMHead, linear_distill, linear_distill_loss, linear_dudi_loss

# dynamo reads it of what goes into a graph
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

ROWS, VOCAB, WIDTH = 32, 301, 16
FAINT = 1e-6  # of the loss: its gradient in hidden states is less than fp16's least number, 6e-8
SCALE = 2.0**24
ROUNDED = 3e-3  # of a forward and a backward pass in fp16
TARGETS = make_targets(ROWS, VOCAB)
TEACHER = make_side(ROWS, VOCAB, 24, seed=9)
SEGMENTS = torch.arange(8).repeat_interleave(ROWS // 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


def distill(hidden: Tensor, head: LMHead) -> Tensor:
    teacher = (TEACHER.hidden, TEACHER.weight)
    return linear_distill_loss(hidden, head, *teacher, targets=TARGETS, ce_weight=0.5).loss


def dudi(hidden: Tensor, head: LMHead) -> Tensor:
    teacher = (TEACHER.hidden, TEACHER.weight)
    return linear_dudi_loss(
        hidden,
        head,
        *teacher,
        TARGETS,
        SEGMENTS,
        preference_weight=0.5,
        reference_log_prob="teacher",
    ).loss


def rows(hidden: Tensor, head: LMHead) -> Tensor:
    got = linear_distill(hidden, head, TEACHER.hidden, TEACHER.weight, targets=TARGETS)
    return (got.divergence - 0.5 * got.log_prob).mean()


def faint(hidden: Tensor, head: LMHead) -> Tensor:
    teacher = (TEACHER.hidden, TEACHER.weight)
    weight = torch.full((ROWS,), FAINT / ROWS)
    return linear_distill_loss(hidden, head, *teacher, token_weight=weight).loss


def compiled(hidden: Tensor, head: LMHead) -> Tensor:
    """Its gradients are faint where they are made: in an operator, before any scale is known."""
    return torch.compile(faint, fullgraph=True, backend="aot_eager")(hidden, head) / FAINT


LOSSES: dict[str, Any] = {"distill": distill, "dudi": dudi, "rows": rows, "compiled": compiled}


class Run:
    """A model, its optimizer and its scaler; fp32 without one."""

    def __init__(self, name: str, scale: float | None) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1 / FAINT, momentum=0.9)
        self.loss, self.half = LOSSES[name], scale is not None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=self.half)

    def step(self, spoil: bool = False) -> list[Tensor]:
        """One step; the gradients that it took."""
        self.optimizer.zero_grad()
        inputs = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype=torch.float16, enabled=self.half):
            hidden = self.model(inputs)
            assert hidden.dtype == (torch.float16 if self.half else torch.float32)
            if spoil:
                hidden = hidden.index_fill(0, torch.tensor([3]), torch.inf)
            head = LMHead(self.model.head.weight, self.model.head.bias)
            loss = self.loss(hidden, head) * FAINT
        assert loss.dtype == torch.float32
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return gradients

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_steps_are_those_of_fp32(name):
    half, whole = Run(name, SCALE), Run(name, None)
    start = whole.weights()
    for step in range(3):
        errors = [error(a, b) for a, b in zip(half.step(), whole.step(), strict=True)]
        assert len(errors) == 6 and max(errors) < ROUNDED * (1 + step)  # weights drift apart
    assert half.scaler.get_scale() == SCALE
    for a, b, first in zip(half.weights(), whole.weights(), start, strict=True):
        assert (a - b).norm() < 3 * ROUNDED * (b - first).norm()


@pytest.mark.parametrize("name", LOSSES)
def test_without_the_scale_the_gradient_is_lost(name):
    """That the test above can fail."""
    unscaled, whole = Run(name, 1.0), Run(name, None)
    errors = [error(a, b) for a, b in zip(unscaled.step(), whole.step(), strict=True)]
    assert min(errors[:4]) > 0.1  # of the body
    assert max(errors[4:]) < ROUNDED  # the head's is fp32


@pytest.mark.parametrize("how", ["a hidden state is inf", "the scale is too large"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_that_overflows_is_skipped(name, how):
    spoil = how == "a hidden state is inf"
    run = Run(name, SCALE if spoil else 2.0**60)
    run.optimizer.zero_grad()
    before, scale = run.weights(), run.scaler.get_scale()
    gradients = run.step(spoil)
    assert not all(g.isfinite().all() for g in gradients)
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), before, strict=True))
    assert run.scaler.get_scale() == scale / 2
    assert not run.optimizer.state  # no momentum of it either
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": SCALE})
    good = run.weights()
    assert all(g.isfinite().all() for g in run.step())
    assert all(not torch.equal(a, b) for a, b in zip(run.weights(), good, strict=True))
