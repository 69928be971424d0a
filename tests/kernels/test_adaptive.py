"""adaptive_kl: where the teacher's head ends, against a full sort; teachers that are hard to cut.

The matrices of the other tests have it as they have every divergence.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cases import (
    BACKENDS,
    SMALL,
    VALUE_RTOL,
    Side,
    error,
    gradient_errors,
    make_side,
    make_targets,
)

from dudi_kernels import linear_distill, linear_distill_loss, linear_dudi_loss
from dudi_kernels.adaptive import FIRST, GROWTH, forward_share

ROWS, VOCAB = 13, 4001  # odd: no sum of equals is 1/2


def probabilities(spread: float, levels: int | None, vocab: int = VOCAB) -> torch.Tensor:
    """(R, V) fp32 of logits of that spread; of few levels there are many equals."""
    logits = torch.randn(ROWS, vocab) * spread
    if levels is not None:
        logits = (logits * levels).round() / levels
    return logits.softmax(-1)


@pytest.mark.parametrize("levels", [None, 1, 4], ids=["distinct", "many equals", "equals"])
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("vocab", [1, 2, FIRST, VOCAB])
def test_the_head_is_that_of_a_full_sort(vocab, spread, levels):
    p = probabilities(spread, levels, vocab)
    q = probabilities(1.0, None, vocab)
    unsure = ((p.sort(-1, descending=True)[0].double().cumsum(-1) - 0.5).abs() < 1e-6).any(-1)
    want = oracle.adaptive_share(p.double(), q.double())
    got = forward_share(p, q)
    torch.testing.assert_close(got[~unsure].double(), want[~unsure], rtol=1e-5, atol=1e-6)
    assert unsure.sum() < ROWS / 2 or vocab <= FIRST


def test_heads_of_all_lengths_in_one_tile():
    """Short ones, such as end beyond the first tokens that are looked at, and one of half of all
    tokens; the last has NaN."""
    p = torch.cat([probabilities(s, None)[:1] for s in (12.0, 3.0, 1.0, 0.02, 0.0, 0.0)])
    q = probabilities(1.0, None)[: len(p)]
    p[-1, 7] = torch.nan
    lengths = (p[:-1].sort(-1, descending=True)[0].cumsum(-1) <= 0.5).sum(-1)
    assert lengths[0] <= 1 and lengths[2] > FIRST and lengths[4] > FIRST * GROWTH
    got = forward_share(p, q)
    want = oracle.adaptive_share(p[:-1].double(), q[:-1].double())
    torch.testing.assert_close(got[:-1].double(), want, rtol=1e-5, atol=0)
    assert got[-1].isnan()


def test_of_equals_the_first_are_inside():
    p = torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2]])  # 0.3, 0.2 is 0.5: no more fits
    p = p + torch.tensor([0.0, 0, 0, 0, 0, 0, -0.15])
    p = p / p.sum()  # 0.35, 0.12, 0.12, ...: the first and one of the five
    q = torch.tensor([[0.0, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    gap = (p - q).abs()[0]
    assert forward_share(p, q)[0] == pytest.approx(float((gap[0] + gap[1]) / gap.sum()), rel=1e-6)


def test_between_equals_it_is_jeffreys():
    """No gap: a weight, and no NaN."""
    p = probabilities(1.0, None)
    assert (forward_share(p, p.clone()) == 0.5).all()
    side = make_side(ROWS, 301, 16)
    got = linear_distill_loss(
        side.hidden, side.head, side.hidden.detach(), side.weight.detach(), divergence="adaptive_kl"
    )
    got.loss.backward()
    assert got.divergence.abs().max() < 1e-6
    assert all(t.grad.isfinite().all() and t.grad.norm() < 1e-5 for t in side.inputs)


def teacher_of(kind: str, rows: int, vocab: int) -> Side:
    teacher = make_side(rows, vocab, 24, seed=9, bias=True)
    assert teacher.bias is not None
    with torch.no_grad():
        match kind:
            case "uniform":
                teacher.hidden.zero_()
                teacher.bias.zero_()
            case "equals":  # logits of few values
                teacher.hidden.zero_()
                teacher.bias.copy_((teacher.bias * 2).round() / 2)
            case "one-hot":
                teacher.hidden.zero_()
                teacher.bias[17] = 200.0
            case "masked":  # and so are half of the student's
                teacher.bias[::3] = -torch.inf
            case "mixed":  # both kinds in one tile
                teacher.hidden[::2] = 0.0
                teacher.hidden[1::2] *= 9
    return teacher


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [False, True], ids=["retain", "recompute"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", ["uniform", "equals", "one-hot", "masked", "mixed"])
def test_teachers_that_are_hard_to_cut(kind, frozen, temperature, per_row, backend):
    rows, vocab = 37, 301
    student, teacher = make_side(rows, vocab, 16, bias=True), teacher_of(kind, rows, vocab)
    if kind == "masked":
        with torch.no_grad():
            student.bias[::3] = -torch.inf
    student.weight.requires_grad_(not frozen)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    settings: dict[str, Any] = {
        "divergence": "adaptive_kl",
        "temperature": temperature,
        "memory_budget": SMALL,
        "backend": backend,
    }
    got: Any = (linear_distill if per_row else linear_distill_loss)(*sides, **settings)
    (got.divergence.mean() if per_row else got.loss).backward()
    there = teacher.bias.isfinite()
    want, guide = (
        Side(s.hidden, s.weight[there], s.bias[there], None, 1.0).double()
        for s in (student, teacher)
    )
    p, q = ((side.logits() / temperature).softmax(-1) for side in (guide, want))
    values = oracle.adaptive_kl(p, q)
    values.mean().backward()
    assert error(got.divergence, values) < VALUE_RTOL
    assert error(student.hidden.grad, want.hidden.grad) < 1e-5
    assert error(student.bias.grad[there], want.bias.grad) < 1e-5
    assert (student.weight.grad is None) == frozen
    if not frozen:
        assert error(student.weight.grad[there], want.weight.grad) < 1e-5


def test_each_row_has_its_own_weight():
    """It is no jeffreys: with one row the sum is, with that row's weight."""
    student, teacher = make_side(5, 301, 16), make_side(5, 301, 24, seed=9)
    with torch.no_grad():
        teacher.hidden.mul_(torch.tensor([0.0, 0.5, 1.0, 2.0, 8.0])[:, None])
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    got = linear_distill_loss(*sides, divergence="adaptive_kl")
    p, q = (side.logits().detach().softmax(-1) for side in (teacher, student))
    weights = oracle.adaptive_share(p, q).tolist()
    assert max(weights) - min(weights) > 0.05
    for row, weight in enumerate(weights):
        fixed = linear_distill_loss(*sides, divergence="jeffreys", beta=weight)
        assert got.divergence[row] == pytest.approx(float(fixed.divergence[row]), rel=1e-5)


@pytest.mark.parametrize("budget", [2**28, 60_000, 26_000], ids=["whole", "pairs", "long"])
@pytest.mark.parametrize("reference", ["teacher", None])
def test_in_the_three_signals(reference, budget):
    """Beside another divergence, and in pairs of several chunks."""
    lengths = torch.tensor([3, 5, 1, 9, 7, 2, 4, 6])
    segments = torch.arange(8).repeat_interleave(lengths)
    rows = len(segments)
    student, teacher = make_side(rows, 301, 8), make_side(rows, 301, 12, seed=9)
    got = linear_dudi_loss(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        make_targets(rows, 301),
        segments,
        preference_weight=0.3,
        off_policy_divergence="adaptive_kl",
        on_policy_divergence="jsd",
        reference_log_prob=reference,
        memory_budget=budget,
    )
    got.loss.backward()
    want = student.double()
    true = oracle.dudi(
        want.logits(),
        teacher.double().logits(),
        make_targets(rows, 301),
        segments,
        weights=(1.0, 1.0, 0.3, 0.0),
        divergences=("adaptive_kl", "jsd"),
        beta=0.5,
        alpha=0.1,
        temperature=1.0,
        preference_beta=0.1,
        length_power=0,
        reference=reference,
        denominators=(None, None, None),
    )
    true["loss"].backward()
    assert error(got.loss, true["loss"]) < VALUE_RTOL
    assert max(gradient_errors(student, want)) < 1e-5
