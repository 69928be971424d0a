"""The divergences alone: g against autograd of phi, values against the textbook, their poles."""

from __future__ import annotations

import oracle
import pytest
import torch

from dudi_kernels import DIVERGENCES
from dudi_kernels.divergences import Helpers

BETA, ALPHA = 0.3, 0.2


def _probabilities(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(7, 23, dtype=torch.float64, generator=random).mul(2).softmax(-1)


def test_the_oracle_knows_each_divergence():
    assert set(DIVERGENCES) == set(oracle.DIVERGENCES)


def terms(name, p, lp, q, lq):
    """(phi, g) with what the divergence wants beside the probabilities."""
    measure = DIVERGENCES[name].measure(BETA, ALPHA)
    a, b = measure.a, measure.b
    if measure.adaptive:
        a = oracle.adaptive_share(p, q)[..., None]
    x = y = z = None
    if measure.helpers is Helpers.MIXTURE:
        x = a * p + (1 - a) * q
        y = x.log()
    elif measure.helpers is Helpers.POWERS:
        cross, gap = p**a * q**b, lp - lq
        x = q ** (a + b) - cross
        y = p ** (a + b) - cross * (1 + b * gap)
        z = q ** (a + b) - cross * (1 - a * gap)
    return measure.terms(p, lp, q, lq, x, y, z, a, b)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_g_is_the_derivative_of_phi_by_log_q(name):
    p, lq = _probabilities(1), _probabilities(2).log().requires_grad_()
    q = lq.exp()
    phi, g = terms(name, p, p.log(), q, lq)
    (want,) = torch.autograd.grad(phi.sum(), lq)
    torch.testing.assert_close(g, want)
    torch.testing.assert_close(phi.sum(-1), oracle.DIVERGENCES[name](p, q, BETA, ALPHA))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_zero_only_between_equals(name):
    p, q = _probabilities(1), _probabilities(2)
    assert terms(name, p, p.log(), p, p.log())[0].sum(-1).abs().max() < 1e-12
    assert terms(name, p, p.log(), q, q.log())[0].sum(-1).min() > 1e-3


@pytest.mark.parametrize(
    ("name", "student_masks", "teacher_masks"),
    [
        ("forward_kl", (True, False), (False, False)),
        ("reverse_kl", (False, False), (True, True)),
        ("jeffreys", (True, False), (True, True)),
        ("adaptive_kl", (True, False), (True, True)),
        ("jsd", (False, False), (False, False)),
        ("skew_forward_kl", (False, False), (False, False)),
        ("skew_reverse_kl", (False, False), (False, False)),
        ("total_variation", (False, False), (False, False)),
        ("alpha_beta", (False, False), (False, False)),
    ],
)
def test_poles(name, student_masks, teacher_masks):
    measure = DIVERGENCES[name].measure(BETA, ALPHA)
    assert measure.student_masks == student_masks
    assert measure.teacher_masks == teacher_masks
