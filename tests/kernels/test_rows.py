"""linear_distill: per-row values and their joint gradient against the float64 oracle."""

from __future__ import annotations

import weakref

import oracle
import pytest
import torch
from cases import (
    BACKENDS,
    KINK_RTOL,
    RTOL,
    VALUE_RTOL,
    error,
    gradient_errors,
    make_side,
    make_targets,
)

from dudi_kernels import DIVERGENCES, linear_distill, linear_distill_loss
from dudi_kernels.api import DistillRows

BETA, ALPHA = 0.3, 0.2
ROWS, VOCAB, WIDTH, TEACHER_WIDTH = 23, 4999, 16, 24
BUDGETS = {"default": 2**28, "small": 150_000}  # two blocks; dozens of blocks
WHOLE_ROWS = 450_000  # adaptive_kl has a few in its forward pass
STYLES: list[dict] = [{}, {"bias": True, "softcap": 3.0, "scale": 0.7}]


def problem(dtype=torch.float32, **style):
    student = make_side(ROWS, VOCAB, WIDTH, dtype, **style)
    return student, make_side(ROWS, VOCAB, TEACHER_WIDTH, dtype, seed=9, **style)


def textbook(student, teacher, targets, name, temperature, teacher_temperature):
    s, t = student.logits(), teacher.logits()
    p, q = (t / teacher_temperature).softmax(-1), (s / temperature).softmax(-1)
    values = oracle.DIVERGENCES[name](p, q, BETA, ALPHA)
    return values, oracle.log_prob(s, targets), oracle.entropy(s)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("temperatures", [(1.0, None), (0.7, 1.6)], ids=["one", "two"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(divergence, temperatures, budget, style, dtype, backend):
    student, teacher = problem(dtype, **style)
    targets = make_targets(ROWS, VOCAB)
    want = student.double()
    if divergence == "adaptive_kl":
        budget = max(budget, WHOLE_ROWS)
    got = linear_distill(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        divergence=divergence,
        beta=BETA,
        alpha=ALPHA,
        temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        targets=targets,
        memory_budget=budget if dtype == torch.float32 else 20 * budget,
        backend=backend,
    )
    guide = teacher.double()
    true = textbook(
        want, guide, targets, divergence, temperatures[0], temperatures[1] or temperatures[0]
    )
    for a, b in zip(got, (*true, oracle.entropy(guide.logits())), strict=True):
        assert error(a, b) < VALUE_RTOL
    weights = [torch.randn(ROWS) for _ in true]
    torch.autograd.backward(got[:3], weights)
    torch.autograd.backward(true, [w.double() for w in weights])
    kink = KINK_RTOL if divergence == "total_variation" else 0
    assert max(gradient_errors(student, want)) < max(RTOL[dtype], kink)
    assert teacher.hidden.grad is teacher.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["divergence", "log_prob", "entropy"])
def test_each_value_alone(which, backend):
    """Backward through one of the three, again and again."""
    student, teacher = problem()
    targets = make_targets(ROWS, VOCAB)
    want = student.double()
    got = linear_distill(
        student.hidden, student.head, teacher.hidden, teacher.head, targets=targets, backend=backend
    )[which]
    true = textbook(want, teacher.double(), targets, "forward_kl", 1.0, 1.0)[which]
    got.sum().backward(retain_graph=True)
    true.sum().backward()
    assert max(gradient_errors(student, want)) < 1e-5
    first = [t.grad.clone() for t in student.inputs]
    for tensor in student.inputs:
        tensor.grad = None
    got.sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(student.inputs, first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DistillRows._fields)
def test_results_are_the_callers_to_edit(name, backend):
    student, teacher = problem()
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    gradients = []
    for edited in (False, True):
        got = linear_distill(*sides, targets=make_targets(ROWS, VOCAB), backend=backend)
        if edited:
            getattr(got, name).data.mul_(3)
        total = (got.divergence + got.log_prob + got.entropy).sum()
        gradients.append(torch.autograd.grad(total, student.inputs))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [linear_distill, linear_distill_loss])
def test_results_without_backward_are_freed(function, backend):
    student, teacher = make_side(ROWS, 301, WIDTH), make_side(ROWS, 301, WIDTH, seed=1)
    hidden = student.hidden * 1
    got = function(hidden, student.head, teacher.hidden, teacher.head, backend=backend)
    alive = weakref.ref(hidden)
    del hidden, got
    assert alive() is None


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "adaptive_kl"])
def test_both_strategies_agree(divergence):
    student, teacher = problem(bias=True)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    retained = linear_distill_loss(*sides, divergence=divergence).loss
    recomputed = linear_distill(*sides, divergence=divergence).divergence.mean()
    torch.testing.assert_close(retained, recomputed, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(x, student.inputs) for x in (retained, recomputed))
    for a, b in zip(*gradients, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("who", "softcap"), [("student", None), ("teacher", None), ("both", None), ("student", 4.0)]
)
def test_masked_blocks(who, softcap, divergence, backend):
    """-inf in a bias, over whole blocks of the vocabulary; gradients stay finite."""
    student, teacher = problem(bias=True, softcap=softcap)
    with torch.no_grad():
        for name, side in (("student", student), ("teacher", teacher)):
            if who in (name, "both"):
                side.bias[100:3000] = -torch.inf
    targets = make_targets(ROWS, 100)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    settings = {"divergence": divergence, "beta": BETA, "alpha": ALPHA, "targets": targets}
    budget = WHOLE_ROWS if divergence == "adaptive_kl" else 150_000
    got = linear_distill(*sides, **settings, memory_budget=budget, backend=backend)
    want = linear_distill_loss(*sides, **settings)
    torch.testing.assert_close(got.divergence, want.divergence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-6)
    (got.divergence.nan_to_num(posinf=0).sum() + got.log_prob.sum()).backward()
    assert all(t.grad.isfinite().all() for t in student.inputs)


def test_ignored_rows_and_leading_shape():
    student, teacher = problem()
    targets = make_targets(ROWS, VOCAB)
    targets[4] = -100
    with torch.no_grad():
        student.hidden[4] = torch.nan
    got = linear_distill(
        student.hidden[None], student.head, teacher.hidden[None], teacher.head, targets=targets
    )
    assert all(values.shape == (1, ROWS) and values[0, 4] == 0 for values in got)
    got.divergence.sum().backward()
    assert not student.hidden.grad[4].any() and student.weight.grad.isfinite().all()
    bare = linear_distill(student.hidden, student.head, teacher.hidden, teacher.head)
    assert bare.log_prob.isnan().all()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    student, teacher = make_side(rows, 301, WIDTH), make_side(rows, 301, WIDTH, seed=1)
    got = linear_distill(student.hidden, student.head, teacher.hidden, teacher.head)
    assert got.divergence.shape == (rows,)
    got.divergence.sum().backward()
    assert all(t.grad.isfinite().all() for t in student.inputs)
