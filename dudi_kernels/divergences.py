"""Divergences as pure functions: p teaches, q learns.

Each takes a tile of probabilities and their logs and returns `(phi, g)`: the divergence is
D = sum_v phi_v, and with g = d phi / d log q its gradient in the scaled logits of q is
g_v - q_v sum(g). Only arithmetic and comparisons are used, so any backend can call them.
m = w p + (1 - w) q is the mixture that jsd and the skew divergences compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

FLOOR = -1e38  # stands for log 0, so that 0 * (lp - lq) is 0 and not NaN
TINY = 2e-38  # keeps 0 / 0 out of the mixtures; the least normal fp32 is 1.2e-38

Terms = Callable[..., "tuple[Any, Any]"]


def forward_kl(p: Any, lp: Any, q: Any, lq: Any, m: Any, lm: Any, w: Any) -> tuple[Any, Any]:
    """KL(p || q)."""
    return p * (lp - lq), -p


def reverse_kl(p: Any, lp: Any, q: Any, lq: Any, m: Any, lm: Any, w: Any) -> tuple[Any, Any]:
    """KL(q || p), as in MiniLLM, arXiv 2306.08543."""
    phi = q * (lq - lp)
    return phi, phi + q


def jsd(p: Any, lp: Any, q: Any, lq: Any, m: Any, lm: Any, w: Any) -> tuple[Any, Any]:
    """beta KL(p || m) + (1 - beta) KL(q || m), w = beta: GKD, arXiv 2306.13649."""
    g = (1 - w) * q * (lq - lm)
    return w * p * (lp - lm) + g, g


def skew_forward_kl(p: Any, lp: Any, q: Any, lq: Any, m: Any, lm: Any, w: Any) -> tuple[Any, Any]:
    """KL(p || alpha p + (1 - alpha) q), w = alpha: DistiLLM, arXiv 2402.03898."""
    return p * (lp - lm), -p * (1 - w) * q / m


def skew_reverse_kl(p: Any, lp: Any, q: Any, lq: Any, m: Any, lm: Any, w: Any) -> tuple[Any, Any]:
    """KL(q || (1 - alpha) p + alpha q), w = 1 - alpha: DistiLLM, arXiv 2402.03898."""
    phi = q * (lq - lm)
    return phi, phi + q - (1 - w) * q * q / m


def total_variation(p: Any, lp: Any, q: Any, lq: Any, m: Any, lm: Any, w: Any) -> tuple[Any, Any]:
    """sum |p - q| / 2, as in f-distill, arXiv 2307.15190."""
    sign = (q > p) * 1.0 - (q < p) * 1.0  # no shared spelling of abs and sign
    return sign * (q - p) * 0.5, q * sign * 0.5


class Pole(NamedTuple):
    """Whether phi and g are infinite where one side masks a token that the other gives mass."""

    phi: bool
    g: bool


class Measure(NamedTuple):
    """A divergence with its parameters: what a sweep needs of it."""

    terms: Terms
    share: float | None  # the teacher's, in the mixture; None: there is no mixture
    student_masks: Pole
    teacher_masks: Pole


def _pole(terms: Terms, share: float | None, p: float, q: float) -> Pole:
    """Find out by asking: one token, one side's mass 1 and the other's 0."""
    lp, lq = (0.0 if mass else FLOOR for mass in (p, q))
    m = TINY if share is None else max(share * p + (1 - share) * q, TINY)
    phi, g = terms(p, lp, q, lq, m, math.log(m), share)
    return Pole(*(not abs(value) < -FLOOR / 2 for value in (phi, g)))


def _no_mixture(beta: float, alpha: float) -> None:
    return None


@dataclass(frozen=True)
class Divergence:
    """A divergence's terms, and the teacher's share of its mixture from beta and alpha."""

    terms: Terms
    teacher_share: Callable[[float, float], float | None] = _no_mixture

    def __call__(
        self, p: Any, lp: Any, q: Any, lq: Any, m: Any = None, lm: Any = None, w: Any = None
    ) -> tuple[Any, Any]:
        return self.terms(p, lp, q, lq, m, lm, w)

    def measure(self, beta: float, alpha: float) -> Measure:
        share = self.teacher_share(beta, alpha)
        return Measure(
            self.terms,
            share,
            student_masks=_pole(self.terms, share, p=1.0, q=0.0),
            teacher_masks=_pole(self.terms, share, p=0.0, q=1.0),
        )


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl),
    "jsd": Divergence(jsd, lambda beta, alpha: beta),
    "skew_forward_kl": Divergence(skew_forward_kl, lambda beta, alpha: alpha),
    "skew_reverse_kl": Divergence(skew_reverse_kl, lambda beta, alpha: 1 - alpha),
    "total_variation": Divergence(total_variation),
}
