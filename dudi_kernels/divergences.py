"""Divergences as pure functions: p teaches, q learns.

Each takes a tile of probabilities and their logs and returns `(phi, g)`: the divergence is
D = sum_v phi_v, and with g = d phi / d log q its gradient in the scaled logits of q is
g_v - q_v sum(g). Only arithmetic and comparisons are used, so any backend can call them (and the
compiled code is made from them). What else a divergence needs comes as x, y, z, by its `Helpers`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

FLOOR = -1e38  # stands for log 0, so that 0 * (lp - lq) is 0 and not NaN
TINY = 2e-38  # keeps 0 / 0 out of the mixtures; the least normal fp32 is 1.2e-38
HEAD_MASS = 0.5  # of the teacher's likeliest tokens, at the most: mu of AKL, arXiv 2404.02657

Terms = Callable[..., "tuple[Any, Any]"]


class Helpers(enum.Enum):
    """What x, y and z are."""

    NONE = 0
    MIXTURE = 1  # m = a p + (1 - a) q and log m
    # with c = p^a q^b and d = log p - log q: q^(a + b) - c, p^(a + b) - c (1 + b d) and
    # q^(a + b) - c (1 - a d), by series where they would cancel
    POWERS = 2


def forward_kl(p, lp, q, lq, x, y, z, a, b):
    """KL(p || q)."""
    return p * (lp - lq), -p


def reverse_kl(p, lp, q, lq, x, y, z, a, b):
    """KL(q || p), as in MiniLLM, arXiv 2306.08543."""
    phi = q * (lq - lp)
    return phi, phi + q


def jeffreys(p, lp, q, lq, x, y, z, a, b):
    """a KL(p || q) + (1 - a) KL(q || p), a = beta: half the symmetric J of Jeffreys at 1/2."""
    reverse = (1 - a) * q * (lq - lp)
    return a * p * (lp - lq) + reverse, reverse + (1 - a) * q - a * p


def jsd(p, lp, q, lq, x, y, z, a, b):
    """beta KL(p || m) + (1 - beta) KL(q || m), a = beta: GKD, arXiv 2306.13649."""
    g = (1 - a) * q * (lq - y)
    return a * p * (lp - y) + g, g


def skew_forward_kl(p, lp, q, lq, x, y, z, a, b):
    """KL(p || alpha p + (1 - alpha) q), a = alpha: DistiLLM, arXiv 2402.03898."""
    return p * (lp - y), -p * (1 - a) * q / x


def skew_reverse_kl(p, lp, q, lq, x, y, z, a, b):
    """KL(q || (1 - alpha) p + alpha q), a = 1 - alpha: DistiLLM, arXiv 2402.03898."""
    phi = q * (lq - y)
    return phi, phi + q - (1 - a) * q * q / x


def total_variation(p, lp, q, lq, x, y, z, a, b):
    """sum |p - q| / 2, as in f-distill, arXiv 2307.15190."""
    sign = (q > p) * 1.0 - (q < p) * 1.0  # no shared spelling of abs and sign
    return sign * (q - p) * 0.5, q * sign * 0.5


def alpha_beta(p, lp, q, lq, x, y, z, a, b):
    """(a p^(a+b) + b q^(a+b) - (a + b) p^a q^b) / (a b (a + b)), a = alpha, b = beta: ABKD,
    arXiv 2505.04560."""
    return (y * a + z * b) / (a * b * (a + b)), x / a


class Pole(NamedTuple):
    """Whether phi and g are infinite where one side masks a token that the other gives mass."""

    phi: bool
    g: bool


class Chain(NamedTuple):
    """For a divergence that adds up over blocks of the vocabulary by the chain rule of KL.

    D = sum_b w_b (D_b + log(w_b / v_b)), with D_b inside block b and w_b, v_b the masses of the
    block under the first and the second distribution; and sum(g) = offset + slope * D.
    """

    teacher_first: bool
    offset: float
    slope: float


class Measure(NamedTuple):
    """A divergence with its parameters: what a sweep needs of it."""

    terms: Terms
    helpers: Helpers
    a: float
    b: float
    student_masks: Pole
    teacher_masks: Pole
    chain: Chain | None
    adaptive: bool  # whether each row has an a of its own (adaptive.py) in place of this one


def _pole(terms: Terms, helpers: Helpers, a: float, b: float, p: float, q: float) -> Pole:
    """Find out by asking: one token, one side's mass 1 and the other's 0."""
    lp, lq = (0.0 if mass else FLOOR for mass in (p, q))
    x = y = z = 0.0
    if helpers is Helpers.MIXTURE:
        x = max(a * p + (1 - a) * q, TINY)
        y = math.log(x)
    elif helpers is Helpers.POWERS:
        x, y, z = q, p, q  # any power of 0 or 1
    phi, g = terms(p, lp, q, lq, x, y, z, a, b)
    return Pole(*(not abs(value) < -FLOOR / 1e6 for value in (phi, g)))


Parameters = Callable[[float, float], "tuple[float, float]"]  # of beta and alpha: a and b


@dataclass(frozen=True)
class Divergence:
    """A divergence's terms, what they need, and their parameters from beta and alpha."""

    terms: Terms
    helpers: Helpers = Helpers.NONE
    parameters: Parameters = lambda beta, alpha: (0.0, 0.0)
    chain: Chain | None = None
    adaptive: bool = False

    def __call__(
        self,
        p: Any,
        lp: Any,
        q: Any,
        lq: Any,
        x: Any = None,
        y: Any = None,
        z: Any = None,
        a: Any = None,
        b: Any = None,
    ) -> tuple[Any, Any]:
        return self.terms(p, lp, q, lq, x, y, z, a, b)

    def measure(self, beta: float, alpha: float) -> Measure:
        a, b = self.parameters(beta, alpha)
        return Measure(
            self.terms,
            self.helpers,
            a,
            b,
            student_masks=_pole(self.terms, self.helpers, a, b, p=1.0, q=0.0),
            teacher_masks=_pole(self.terms, self.helpers, a, b, p=0.0, q=1.0),
            chain=self.chain,
            adaptive=self.adaptive,
        )


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl, chain=Chain(True, -1.0, 0.0)),
    "reverse_kl": Divergence(reverse_kl, chain=Chain(False, 1.0, 1.0)),
    "jeffreys": Divergence(jeffreys, parameters=lambda beta, alpha: (beta, 0.0)),
    "adaptive_kl": Divergence(jeffreys, parameters=lambda beta, alpha: (0.5, 0.0), adaptive=True),
    "jsd": Divergence(jsd, Helpers.MIXTURE, lambda beta, alpha: (beta, 0.0)),
    "skew_forward_kl": Divergence(
        skew_forward_kl, Helpers.MIXTURE, lambda beta, alpha: (alpha, 0.0)
    ),
    "skew_reverse_kl": Divergence(
        skew_reverse_kl, Helpers.MIXTURE, lambda beta, alpha: (1 - alpha, 0.0)
    ),
    "total_variation": Divergence(total_variation),
    "alpha_beta": Divergence(alpha_beta, Helpers.POWERS, lambda beta, alpha: (alpha, beta)),
}


def distinct() -> dict[Terms, Divergence]:
    """One divergence of each terms, in order: what compiled code has a number for."""
    return {divergence.terms: divergence for divergence in DIVERGENCES.values()}
