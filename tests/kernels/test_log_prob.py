"""linear_cross_entropy, linear_log_prob and sequence_log_prob against the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, RTOL, VALUE_RTOL, error, gradient_errors, make_side, make_targets

from dudi_kernels import linear_cross_entropy, linear_log_prob, sequence_log_prob

ROWS, VOCAB, WIDTH = 37, 5003, 16
BUDGETS = {"default": 2**28, "small": 900_000}  # more than one chunk; blocks of some columns
STYLES: list[dict] = [{}, {"bias": True, "softcap": 3.0, "scale": 0.7}]


@pytest.fixture
def targets():
    return make_targets(ROWS, VOCAB)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_matches_float64(reduction, budget, style, dtype, targets, backend):
    side = make_side(ROWS, VOCAB, WIDTH, dtype, **style)
    want = side.double()
    targets[::5] = -100
    got = linear_cross_entropy(
        side.hidden, side.head, targets, reduction=reduction, memory_budget=budget, backend=backend
    )
    true = F.cross_entropy(want.logits(), targets, reduction=reduction)
    assert error(got, true) < VALUE_RTOL
    weight = 0.5 + torch.rand(true.shape)  # no fp16 underflow
    (got * weight).sum().backward()
    (true * weight.double()).sum().backward()
    assert max(gradient_errors(side, want)) < RTOL[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
@pytest.mark.parametrize("budget", [2**28, 20_000], ids=BUDGETS)
def test_log_prob_matches_float64(budget, style, dtype, targets, backend):
    side = make_side(ROWS, VOCAB, WIDTH, dtype, **style)
    want = side.double()
    got = linear_log_prob(
        side.hidden, side.head, targets, temperature=0.6, memory_budget=budget, backend=backend
    )
    true = oracle.log_prob(want.logits() / 0.6, targets)
    assert got.dtype == torch.float32
    assert error(got, true) < VALUE_RTOL
    weight = torch.randn(ROWS)
    got.backward(weight, retain_graph=True)
    true.backward(weight.double())
    assert max(gradient_errors(side, want)) < RTOL[dtype]
    first = [t.grad.clone() for t in side.inputs]
    for tensor in side.inputs:
        tensor.grad = None
    got.backward(weight)  # recompute strategy: again is fine
    assert all(torch.equal(t.grad, g) for t, g in zip(side.inputs, first, strict=True))


def test_both_strategies_agree(targets):
    side = make_side(ROWS, VOCAB, WIDTH, bias=True)
    a = linear_cross_entropy(side.hidden, side.head, targets)
    b = -linear_log_prob(side.hidden, side.head, targets).mean()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for x, y in zip(
        torch.autograd.grad(a, side.inputs), torch.autograd.grad(b, side.inputs), strict=True
    ):
        assert error(x, y) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_sum_their_rows(targets, backend):
    side = make_side(ROWS, VOCAB, WIDTH)
    want = side.double()
    segments = torch.tensor([0] * 5 + [2] * 20 + [3] * 12)
    targets[7] = -100
    got = sequence_log_prob(
        side.hidden, side.head, targets, segments, num_segments=6, backend=backend
    )
    rows = oracle.log_prob(want.logits(), targets.clamp(min=0)) * (targets >= 0)
    true = torch.zeros(6, dtype=torch.float64).index_add(0, segments, rows)
    assert error(got, true) < VALUE_RTOL
    assert got[1] == got[4] == got[5] == 0
    weight = torch.randn(6)
    (got * weight).sum().backward()
    (true * weight.double()).sum().backward()
    assert max(gradient_errors(side, want)) < 1e-5
    assert len(sequence_log_prob(side.hidden, side.head, targets, segments, backend=backend)) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens(targets, backend):
    side = make_side(ROWS, VOCAB, WIDTH, bias=True)
    masked = torch.arange(VOCAB) < 4500  # whole blocks of the vocabulary
    with torch.no_grad():
        side.bias[masked] = -torch.inf
    targets.clamp_(min=4500)
    targets[0] = 3
    got = linear_log_prob(side.hidden, side.head, targets, backend=backend)
    true = oracle.log_prob(side.double().logits(), targets)
    assert got[0] == -torch.inf
    assert error(got[1:], true[1:]) < VALUE_RTOL
    got.sum().backward()
    assert all(t.grad.isfinite().all() for t in side.inputs)
    assert not side.bias.grad[masked][4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, backend):
    side = make_side(rows, 301, WIDTH)
    targets = make_targets(rows, 301)
    got = linear_log_prob(side.hidden, side.head, targets, backend=backend)
    assert got.shape == (rows,)
    loss = got.sum() + linear_cross_entropy(side.hidden, side.head, targets, backend=backend)
    loss.backward()
    assert all(t.grad.isfinite().all() for t in side.inputs)
    empty = sequence_log_prob(side.hidden, side.head, targets, torch.zeros_like(targets))
    assert empty.shape == (rows,)


def test_leading_shape_strides_and_ignored_rows():
    side = make_side(24, 301, WIDTH)
    targets = make_targets(24, 301)
    targets[5] = -100
    with torch.no_grad():
        side.hidden[5] = torch.nan
    flat = linear_log_prob(side.hidden, side.head, targets)
    strided = side.hidden.detach().t().contiguous().t().view(2, 12, WIDTH)
    cube = linear_log_prob(strided, side.weight.detach().t().contiguous().t(), targets.view(2, 12))
    assert cube.shape == (2, 12) and flat[5] == cube[0, 5] == 0
    torch.testing.assert_close(cube.view(-1), flat)
    none = linear_cross_entropy(
        strided, side.weight.detach(), targets.view(2, 12), reduction="none"
    )
    torch.testing.assert_close(none, -cube)
    flat.sum().backward()
    assert side.weight.grad.isfinite().all() and not side.hidden.grad[5].any()


def test_double_backward_and_changed_weights_are_errors():
    side = make_side(4, 301, WIDTH)
    values = linear_log_prob(side.hidden, side.head, make_targets(4, 301))
    (first,) = torch.autograd.grad(values.sum(), side.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (first.square().sum() + side.weight.sum()).backward()
    values = linear_log_prob(side.hidden, side.head, make_targets(4, 301))
    with torch.no_grad():
        side.weight.mul_(2)  # an optimizer step in between
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parts_and_no_grad(targets, backend):
    side = make_side(ROWS, VOCAB, WIDTH, bias=True)
    want = side.double()
    oracle.log_prob(want.logits(), targets).sum().backward()
    side.weight.requires_grad_(False)
    linear_log_prob(side.hidden, side.head, targets, backend=backend).sum().backward()
    assert side.weight.grad is None
    assert error(side.hidden.grad, want.hidden.grad) < 1e-5
    assert error(side.bias.grad, want.bias.grad) < 1e-5
    with torch.no_grad():
        assert not linear_log_prob(side.hidden, side.head, targets, backend=backend).requires_grad


def test_autocast_rounds_hidden_states_only(targets):
    side = make_side(ROWS, VOCAB, WIDTH)
    side.hidden = side.hidden.detach().bfloat16().float().requires_grad_()
    want = side.double()
    true = oracle.log_prob(want.logits(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_log_prob(side.hidden, side.head, targets)
        got.sum().backward()
    true.sum().backward()
    assert error(got, true) < VALUE_RTOL
    assert max(gradient_errors(side, want)) < 1e-5
