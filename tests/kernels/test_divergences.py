"""The divergences alone: g against autograd of phi, values against the textbook, their poles."""

from __future__ import annotations

import oracle
import pytest
import torch

from dudi_kernels import DIVERGENCES

BETA, ALPHA = 0.3, 0.2


def _probabilities(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(7, 23, dtype=torch.float64, generator=random).mul(2).softmax(-1)


def test_the_oracle_knows_each_divergence():
    assert set(DIVERGENCES) == set(oracle.DIVERGENCES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_g_is_the_derivative_of_phi_by_log_q(name):
    p, lq = _probabilities(1), _probabilities(2).log().requires_grad_()
    q = lq.exp()
    share = DIVERGENCES[name].teacher_share(BETA, ALPHA)
    m = None if share is None else share * p + (1 - share) * q
    phi, g = DIVERGENCES[name](p, p.log(), q, lq, m, None if m is None else m.log(), share)
    (want,) = torch.autograd.grad(phi.sum(), lq)
    torch.testing.assert_close(g, want)
    torch.testing.assert_close(phi.sum(-1), oracle.DIVERGENCES[name](p, q, BETA, ALPHA))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_zero_only_between_equals(name):
    p, q = _probabilities(1), _probabilities(2)
    share = DIVERGENCES[name].teacher_share(BETA, ALPHA)

    def value(a, b):
        m = None if share is None else share * a + (1 - share) * b
        lm = None if m is None else m.log()
        return DIVERGENCES[name](a, a.log(), b, b.log(), m, lm, share)[0].sum(-1)

    assert value(p, p).abs().max() < 1e-12
    assert value(p, q).min() > 1e-3


@pytest.mark.parametrize(
    ("name", "student_masks", "teacher_masks"),
    [
        ("forward_kl", (True, False), (False, False)),
        ("reverse_kl", (False, False), (True, True)),
        ("jsd", (False, False), (False, False)),
        ("skew_forward_kl", (False, False), (False, False)),
        ("skew_reverse_kl", (False, False), (False, False)),
        ("total_variation", (False, False), (False, False)),
    ],
)
def test_poles(name, student_masks, teacher_masks):
    measure = DIVERGENCES[name].measure(BETA, ALPHA)
    assert measure.student_masks == student_masks
    assert measure.teacher_masks == teacher_masks
