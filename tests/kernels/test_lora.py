"""Heads with a LoRA: values and the gradients of A, B and the hidden states, against float64."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cases import RTOL, VALUE_RTOL, error, make_side, make_targets

from dudi_kernels import (
    LMHead,
    LoRA,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
)

ROWS, VOCAB, WIDTH, RANK, SCALING = 24, 5003, 16, 3, 1.7


def problem(dtype):
    """Two sides with a LoRA each, the student's base frozen; and float64 copies."""
    random = torch.Generator().manual_seed(5)
    sides = []
    for seed in (0, 9):
        side = make_side(ROWS, VOCAB, WIDTH, dtype, bias=True, softcap=9.0, seed=seed)
        side.weight.requires_grad_(False)
        side.bias.requires_grad_(False)
        a, b = (
            torch.randn(*shape, generator=random).requires_grad_()
            for shape in ((RANK, WIDTH), (VOCAB, RANK))
        )
        sides.append((side, LoRA(a, b, SCALING)))
    return sides


def head_of(side, lora):
    return LMHead(side.weight, side.bias, side.softcap, side.scale, lora)


def dense(side, lora):
    """(float64 logits, leaves: hidden, A, B)"""
    wide = side.double()
    a, b = (t.detach().double().requires_grad_() for t in (lora.a, lora.b))
    weight = wide.weight.detach() + SCALING * b @ a
    bias = None if wide.bias is None else wide.bias.detach()
    scores = oracle.logits(wide.hidden, weight, bias, side.softcap, side.scale)
    return scores, (wide.hidden, a, b)


def losses(dtype):
    (student, lora), (teacher, other) = problem(dtype)
    targets = make_targets(ROWS, VOCAB)
    segments = torch.arange(4).repeat_interleave(ROWS // 4)
    head = head_of(student, lora)
    sides = (student.hidden, head, teacher.hidden, head_of(teacher, other))
    s, leaves = dense(student, lora)
    t, _ = dense(teacher, other)
    kl = oracle.DIVERGENCES["forward_kl"](t.softmax(-1), s.softmax(-1), 0.5, 0.1)
    log_prob = oracle.log_prob(s, targets)
    pairs: dict[str, Any] = {"off_policy_weight": 1.0, "on_policy_weight": 0.0, "ce_weight": 0.5}
    plus = segments % 2 == 0
    table = {
        "distill_loss": (lambda: linear_distill_loss(*sides).loss, kl.mean()),
        "distill": (lambda: linear_distill(*sides).divergence.mean(), kl.mean()),
        "cross_entropy": (
            lambda: linear_cross_entropy(student.hidden, head, targets),
            -log_prob.mean(),
        ),
        "log_prob": (
            lambda: linear_log_prob(student.hidden, head, targets).sum(),
            log_prob.sum(),
        ),
        "dudi": (
            lambda: linear_dudi_loss(*sides, targets, segments, **pairs).loss,
            kl[plus].mean() - 0.5 * log_prob[plus].mean(),
        ),
    }
    return table, (student.hidden, lora.a, lora.b), leaves, student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["distill_loss", "distill", "cross_entropy", "log_prob", "dudi"])
def test_matches_the_merged_head(name, dtype):
    table, inputs, leaves, student = losses(dtype)
    run, want = table[name]
    got = run()
    assert error(got, want) < VALUE_RTOL
    got.backward()
    want.backward()
    assert student.weight.grad is student.bias.grad is None
    for value, true in zip(inputs, leaves, strict=True):
        assert error(value.grad, true.grad) < RTOL[dtype]


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("function", [linear_distill, linear_distill_loss])
def test_a_close_pair(function, autocast):
    """A teacher a percent away, without the factors: nothing cancels what is rounded in A's."""
    random = torch.Generator().manual_seed(3)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).bfloat16()

    hidden, weight = draw(64, 256), draw(3000, 256, scale=0.1)
    a, b = draw(32, 256, scale=0.06), draw(3000, 32, scale=0.1)
    merged = weight.double() + 2 * b.double() @ a.double()
    teacher = (merged * (1 + 0.01 * torch.randn(3000, 256, generator=random))).float()
    leaves = [t.double().requires_grad_() for t in (hidden, a, b)]
    wide, wide_a, wide_b = leaves
    s = wide @ (weight.double() + 2 * wide_b @ wide_a).T
    t = hidden.double() @ teacher.double().T
    oracle.kl(t.softmax(-1), s.softmax(-1)).mean().backward()
    if autocast:
        hidden, weight, a, b = (tensor.float() for tensor in (hidden, weight, a, b))
    inputs = [tensor.requires_grad_() for tensor in (hidden, a, b)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        head = LMHead(weight, lora=LoRA(a, b, 2.0))
        result = function(hidden, head, hidden.detach().float(), teacher)
    result.divergence.mean().backward() if function is linear_distill else result.loss.backward()
    for value, true in zip(inputs, leaves, strict=True):
        assert error(value.grad, true.grad) < RTOL[torch.bfloat16]


def test_ignored_rows_reach_no_factor():
    (student, lora), _ = problem(torch.float32)
    targets = make_targets(ROWS, VOCAB)
    targets[3] = -100
    with torch.no_grad():
        student.hidden[3] = torch.nan
    linear_cross_entropy(student.hidden, head_of(student, lora), targets).backward()
    assert all(t.grad.isfinite().all() for t in (lora.a, lora.b, student.hidden))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((3, 16), (300, 2), r"lora must have a of shape \(r, D\)"),
        ((3, 15), (300, 3), r"lora must fit a head of shape \(300, 16\), got \(300, 15\)"),
    ],
)
def test_refuses_what_does_not_fit(a, b, message):
    with pytest.raises(ValueError, match=message):
        LMHead(torch.zeros(300, 16), lora=LoRA(torch.zeros(*a), torch.zeros(*b)))
