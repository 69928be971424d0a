"""How large the gradient of a divergence can be over some columns, known by their masses alone.

P and Q are the masses of teacher and student there, R is the largest log(q / p), not below 0, and
n the number of columns. Each function bounds sum |g - k q|, where k is the divergence's `shift`:
since q sums to 1, g - q sum(g) = (g - k q) - q (sum(g) - k). What lies below 0 is bounded by
q log(p / q) <= p / e, since log(r) / r <= 1 / e.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dudi_kernels import divergences
from dudi_kernels.divergences import Terms

E = math.e


def forward_kl(P, Q, R, n, a, b):
    return P


def reverse_kl(P, Q, R, n, a, b):
    return P / E + Q * R


def jeffreys(P, Q, R, n, a, b):
    return a * P + (1 - a) * reverse_kl(P, Q, R, n, a, b)


def jsd(P, Q, R, n, a, b):
    """q log(q / m) <= -q log(1 - a)."""
    return (1 - a) * ((a * P + (1 - a) * Q) / E - math.log(1 - a) * Q)


def skew_forward_kl(P, Q, R, n, a, b):
    """(1 - a) q <= m."""
    return P


def skew_reverse_kl(P, Q, R, n, a, b):
    """As jsd; and (1 - a) q q / m <= q."""
    return (a * P + (1 - a) * Q) / E + (1 - math.log(1 - a)) * Q


def total_variation(P, Q, R, n, a, b):
    return Q / 2


def alpha_beta(P, Q, R, n, a, b):
    """Hoelder: sum p^a q^b <= (sum p^s)^(a / s) (sum q^s)^(b / s), s = a + b."""
    both = a + b
    p, q = _powers(P, n, both), _powers(Q, n, both)
    return (q + p ** (a / both) * q ** (b / both)) / a


def _powers(mass: Any, n: int, power: float) -> Any:
    """sum p^power is largest where all are alike (power < 1), or all is in one (power > 1)."""
    return mass**power * n ** max(0.0, 1 - power)


class Reach(NamedTuple):
    bound: Callable[..., Any]  # (P, Q, R, n, a, b), numbers or tensors
    shift: Callable[[Any], Any] = lambda a: 0.0  # k, of a
    ratio: bool = False  # whether R is needed


REACH: dict[Terms, Reach] = {
    divergences.forward_kl: Reach(forward_kl),
    divergences.reverse_kl: Reach(reverse_kl, lambda a: 1.0, ratio=True),
    divergences.jeffreys: Reach(jeffreys, lambda a: 1 - a, ratio=True),
    divergences.jsd: Reach(jsd),
    divergences.skew_forward_kl: Reach(skew_forward_kl),
    divergences.skew_reverse_kl: Reach(skew_reverse_kl),
    divergences.total_variation: Reach(total_variation),
    divergences.alpha_beta: Reach(alpha_beta),
}
