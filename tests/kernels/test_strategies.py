"""A scalar loss by *retain* and by *recompute*: the same values and gradients."""

from __future__ import annotations

import pytest
import torch
from cases import SMALL, Side, error, make_side, make_targets

from dudi_kernels import linear_cross_entropy, linear_distill_loss, linear_dudi_loss, prepare

ROWS, VOCAB = 40, 1500
TARGETS = make_targets(ROWS, VOCAB)
SEGMENTS = torch.arange(4).repeat_interleave(10)
WEIGHT = torch.linspace(0, 2, ROWS)  # the first row counts for nothing


def distill(student, teacher, **settings):
    return linear_distill_loss(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        targets=TARGETS,
        token_weight=WEIGHT,
        ce_weight=0.3,
        **settings,
    )


def dudi(student, teacher, **settings):
    return linear_dudi_loss(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        TARGETS,
        SEGMENTS,
        preference_weight=0.4,
        reference_log_prob="teacher",
        ce_weight=0.1,
        **settings,
    )


LOSSES = {
    "forward_kl": lambda *sides, **s: distill(*sides, **s),
    "jsd": lambda *sides, **s: distill(*sides, divergence="jsd", temperature=1.7, **s),
    "three signals": lambda *sides, **s: dudi(*sides, on_policy_divergence="forward_kl", **s),
    "two divergences": lambda *sides, **s: dudi(*sides, on_policy_divergence="jsd", **s),
    "two signals": lambda *sides, **s: dudi(*sides, off_policy_weight=0.0, **s),
    "preference alone": lambda *sides, **s: dudi(
        *sides, off_policy_weight=0.0, on_policy_weight=0.0, **s
    ),
    "cross-entropy": lambda student, _, **s: (
        linear_cross_entropy(student.hidden, student.head, TARGETS, **s),
    ),
}


def sides() -> tuple[Side, Side]:
    return make_side(ROWS, VOCAB, 24, bias=True, softcap=20.0), make_side(ROWS, VOCAB, 16, seed=3)


@pytest.fixture
def ran(monkeypatch):
    """Which strategies were asked for."""

    def force(recompute: bool) -> list[bool]:
        calls = []

        def choose(*arguments: object) -> bool:
            calls.append(recompute)
            return recompute

        monkeypatch.setattr(prepare, "prefers_recompute", choose)
        return calls

    return force


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_strategies_agree(name, backend, ran):
    results = []
    for recompute in (False, True):
        calls = ran(recompute)
        student, teacher = sides()
        got = LOSSES[name](student, teacher, backend=backend, memory_budget=SMALL)
        (got[0] * 3.0).backward()
        assert calls == [recompute]
        results.append([*got, *(t.grad for t in student.inputs)])
    for retained, streamed in zip(*results, strict=True):
        assert error(streamed, retained) <= 3e-6


@pytest.mark.parametrize("backend", ["triton"])
def test_a_head_of_two_divergences_is_rounded_once(backend, ran):
    grads = []
    for recompute, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        ran(recompute)
        student, teacher = (make_side(ROWS, VOCAB, 24, torch.bfloat16, seed=i) for i in range(2))
        student.weight = student.weight.detach().to(dtype).requires_grad_()
        teacher.hidden, teacher.weight = teacher.hidden.to(dtype), teacher.weight.to(dtype)
        student.hidden = student.hidden.to(dtype)
        LOSSES["two divergences"](student, teacher, backend=backend)[0].backward()
        grads.append(student.weight.grad.float())
    got, want = grads
    # of two bf16 numbers next to each other; a sum of rounded ones is off by more
    apart = (got - want).abs() / want.abs().clamp(min=1e-30)
    assert float((apart > 2**-7).float().mean()) < 1e-3
    assert error(got, want) < 2e-3


@pytest.mark.parametrize("backend", ["triton"])
def test_an_adaptive_divergence_is_retained(backend, ran):
    calls = ran(True)
    distill(*sides(), backend=backend, divergence="adaptive_kl", memory_budget=2**24)
    assert not calls
