"""Tiles that are left out of the gradient: the certificate holds, and what is kept is exact.

The hidden states are the identity, so the head's gradient is the gradient of the logits itself.
"""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, error

from dudi_kernels import (
    LMHead,
    TopKTeacher,
    linear_distill_loss,
    linear_dudi_loss,
    prepare,
)
from dudi_kernels.divergences import DIVERGENCES
from dudi_kernels.reach import REACH
from dudi_kernels.skipping import Blocks, Tally, choose, runs_of
from dudi_kernels.tiles import RowState, Setting, helpers

ROWS, VOCAB = 40, 1000
TOLERANCES = (1e-2, 1e-1)


@pytest.fixture(autouse=True)
def _small_tiles(request, monkeypatch):
    """The interpreter's own tiles are larger than the vocabulary here."""
    if request.node.callspec.params.get("backend") == "triton":
        from dudi_kernels.backends.triton import launch

        small = launch.Blocks(16, 128, 64, 4, 1)
        monkeypatch.setattr(launch, "fused_blocks", lambda target, dtype, sums: small)


@pytest.fixture(params=["retain", "recompute"])
def strategy(request, monkeypatch):
    backend = request.node.callspec.params["backend"]
    if backend == "torch" and request.param == "recompute":
        pytest.skip("scalar losses of the torch backend retain")
    monkeypatch.setattr(prepare, "prefers_recompute", lambda *_: request.param == "recompute")
    return request.param


def sides(close: float = 0.3, bias: bool = False, **settings):
    """Logits whose tiles differ in mass; a student near its teacher."""
    region = torch.randn(VOCAB // 50).repeat_interleave(50)[:, None] * 3
    weight = torch.randn(VOCAB, ROWS) * 2 + region
    other = weight + close * torch.randn(VOCAB, ROWS)
    own = torch.randn(VOCAB) if bias else None
    if own is not None:
        own[::7] = -torch.inf
    heads = [LMHead(w.requires_grad_(), own, **settings) for w in (weight, other.detach())]
    return torch.eye(ROWS), heads[0], torch.eye(ROWS), heads[1]


def gradient(arguments, **settings):
    """The loss's results, and the gradient of the logits."""
    arguments[1].weight.grad = None
    got = linear_distill_loss(*arguments, **settings)
    got.loss.backward()
    return got, arguments[1].weight.grad.T.clone()


def check(exact, whole, found, kept, tolerance, weight):
    """Values are those of the exact loss; the gradient is lost in whole tiles, within the bound."""
    assert torch.equal(exact.loss, found.loss)
    assert exact.skipped == exact.dropped == 0
    lost = (whole - kept).double().abs().sum() / weight
    assert lost <= found.dropped * (1 + 1e-3) + 1e-6 and found.dropped <= tolerance
    there = kept != 0
    assert error(kept[there], whole[there]) <= 1e-6
    if found.skipped == 0:
        assert error(kept, whole) <= 1e-6
    return float(lost), float(found.skipped)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_certificate_holds(backend, strategy, divergence):
    arguments = sides()
    settings = {"divergence": divergence, "backend": backend, "beta": 0.3, "alpha": 0.4}
    exact, whole = gradient(arguments, **settings)
    shares = []
    for tolerance in TOLERANCES:
        found, kept = gradient(arguments, gradient_tolerance=tolerance, **settings)
        shares.append(check(exact, whole, found, kept, tolerance, 1.0)[1])
    assert shares == sorted(shares) and shares[-1] > 0.05


@pytest.mark.parametrize(
    "case",
    [
        {"temperature": 2.0},
        {"temperature": 0.7, "teacher_temperature": 1.5},
        {"bias": True},
        {"softcap": 9.0, "scale": 1.5},
        {"weights": True},
    ],
    ids=lambda case: "-".join(case),
)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_certificate_holds_with(backend, strategy, divergence, case):
    settings = {k: case[k] for k in case if "temperature" in k}
    head = {k: case[k] for k in case if k in ("bias", "softcap", "scale")}
    arguments = sides(**head)
    if "weights" in case:
        settings["token_weight"] = torch.rand(ROWS) * (torch.arange(ROWS) % 3 > 0)
    weight = settings.get("token_weight", torch.full((ROWS,), 1 / ROWS)).sum().item()
    weight *= head.get("scale", 1.0) / settings.get("temperature", 1.0)
    common = {"divergence": divergence, "backend": backend, **settings}
    exact, whole = gradient(arguments, **common)
    found, kept = gradient(arguments, gradient_tolerance=0.05, **common)
    check(exact, whole, found, kept, 0.05, weight)
    assert found.skipped > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_are_kept(backend, strategy):
    arguments = sides()
    likely = (arguments[2] @ arguments[3].weight.T).topk(VOCAB).indices
    targets = likely[:, -1].contiguous()  # the least likely tokens
    common = {"backend": backend, "targets": targets, "ce_weight": 0.5}
    exact, whole = gradient(arguments, **common)
    found, kept = gradient(arguments, gradient_tolerance=0.05, **common)
    check(exact, whole, found, kept, 0.05, 1.5)
    own = torch.arange(ROWS), targets
    assert found.skipped > 0 and error(kept[own], whole[own]) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_signals(backend, strategy):
    hidden, student, teacher_hidden, teacher = sides()
    targets = (teacher_hidden @ teacher.weight.T).argmax(1)
    segments = torch.arange(ROWS) // 10
    common = {"preference_weight": 0.5, "ce_weight": 0.2, "backend": backend}
    results = []
    for tolerance in (0.0, 0.05):
        student.weight.grad = None
        got = linear_dudi_loss(
            hidden, student, teacher_hidden, teacher, targets, segments,
            gradient_tolerance=tolerance, **common,
        )  # fmt: skip
        got.loss.backward()
        results.append((got, student.weight.grad.T.clone()))
    (_, whole), (found, kept) = results
    assert found.dropped <= 0.05 and 0 < found.skipped < 1
    assert error(kept[kept != 0], whole[kept != 0]) <= 1e-6
    pulls = 0.2 + 0.5 * 0.1 * 10  # of cross-entropy; of pairs, at the most: beta |sigmoid| a row
    lost = (whole - kept).abs().sum()
    assert 0 < lost <= 0.05 * (2.0 + pulls)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_hidden_states_too(backend, strategy):
    """All gradients come from the same tiles; twice the same bits."""
    torch.manual_seed(1)
    hidden = torch.randn(ROWS, 24).requires_grad_()
    weight = torch.randn(VOCAB, 24).requires_grad_()
    bias = (torch.randn(VOCAB // 50).repeat_interleave(50) * 4).requires_grad_()
    teacher = torch.randn(ROWS, 24), LMHead(torch.randn(VOCAB, 24), bias.detach())
    grads = []
    for tolerance in (0.0, 0.02, 0.02):
        loss = linear_distill_loss(
            hidden, LMHead(weight, bias), *teacher, backend=backend, gradient_tolerance=tolerance
        )
        grads.append(torch.autograd.grad(loss.loss, (hidden, weight, bias)))
    assert all(torch.equal(a, b) for a, b in zip(*grads[1:], strict=True))
    assert all(error(a, b) <= 0.1 for a, b in zip(*grads[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*grads[:2], strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reach_is_a_bound(divergence):
    """Of masses over any columns, for spread and for close distributions."""
    measure = DIVERGENCES[divergence].measure(0.3, 0.6)
    reach = REACH[measure.terms]
    for trial in range(60):
        lp = (torch.randn(60, dtype=torch.float64) * (trial % 8)).log_softmax(0)
        near = trial % 3 == 0
        lq = torch.randn(60, dtype=torch.float64) * (0.1 if near else trial % 5)
        lq = (lq + lp * near).log_softmax(0)
        p, q = lp.exp(), lq.exp()
        _, g = measure.terms(p, lp, q, lq, *helpers(measure, p, lp, q, lq), measure.a, measure.b)
        for own in (slice(0, 60), slice(0, 20), slice(20, 50), slice(50, 51)):
            ratio = (lq - lp)[own].max().clamp(min=0)
            bound = (
                reach.bound(p[own].sum(), q[own].sum(), ratio, len(p[own]), measure.a, measure.b)
                + q[own].sum() * (g.sum() - reach.shift(measure.a)).abs()
            )
            assert (g - q * g.sum())[own].abs().sum() <= bound * (1 + 1e-9) + 1e-12


def test_choice():
    """Block by block: the smallest as long as they fit; nothing that is not a number."""
    state = RowState.fresh(torch.ones(5))
    setting = Setting(4, None, 1.0, 1.0, None, 1.0, False, 1)
    nan = torch.nan
    bounds = torch.tensor([[0.4, 0.1, 0.0, 1.5], [0.5, 0.6, 0.7, 0.8], [nan, 0.0, 0.01, 9.0]])
    blocks = Blocks(bounds, torch.tensor([2.0, 2.0, 1.0]), torch.zeros(3, 4), 2, 1)
    choice = choose(setting, state, slice(0, 5), blocks, 0.3)
    assert choice.live.tolist() == [
        [False, False, False, True],
        [False, True, True, True],
        [True, False, False, True],
    ]
    tally = Tally(torch.device("cpu"))
    tally.add(choice, blocks, 5, 4)
    assert float(tally.result().skipped) == pytest.approx((2 * 3 + 2 * 1 + 1 * 2) / 20)
    assert float(tally.result().dropped) == pytest.approx((0.5 + 0.5 + 0.01) / 5, rel=1e-2)


def test_runs():
    live = [bool(int(c)) for c in "0110010000011"]
    assert runs_of(live, 10, 127) == [(10, 60), (110, 127)]
    assert runs_of([False] * 3, 10, 25) == []


def test_refusals():
    arguments = sides()
    for wrong in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="gradient_tolerance"):
            linear_distill_loss(*arguments, gradient_tolerance=wrong)
    top = TopKTeacher(torch.zeros(ROWS, 1, dtype=torch.long), torch.full((ROWS, 1), -1.0))
    with pytest.raises(ValueError, match="gradient_tolerance must be 0 with a TopKTeacher"):
        linear_distill_loss(arguments[0], arguments[1], top, gradient_tolerance=0.1)
