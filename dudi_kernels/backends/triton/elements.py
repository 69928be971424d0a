"""Element-wise mathematics of the kernels, as device functions.

Tiles are (BLOCK_N, BLOCK_V) fp32; what belongs to a row is (BLOCK_N, 1), or (BLOCK_N,) where a loop
carries it: of a column, threads hold copies, which the compiler doesn't merge in a loop. A masked
logit (-inf) or a column beyond the vocabulary is FLOOR, so that its probability is 0 and its
products are 0, not NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from dudi_kernels import divergences

FLOOR = tl.constexpr(divergences.FLOOR)
TINY = tl.constexpr(divergences.TINY)
NOTHING = tl.constexpr(-200.0)  # its exp is 0, and its product with a sum is finite


@triton.jit
def _probe():
    """Tells whether the interpreter runs."""


INTERPRETED = isinstance(_probe, InterpretedFunction)


@triton.jit
def split_float(value):
    """A float64 as two fp32: taken off one after the other, a log-probability is as exact as its
    logit, however large that is."""
    high = value.to(tl.float32)
    finite = tl.where(tl.abs(high) == float("inf"), 0.0, value)  # no inf - inf
    return high, (finite - finite.to(tl.float32)).to(tl.float32)


@triton.jit
def log_prob_of(logits, high, low):
    """log softmax, not below FLOOR."""
    return tl.maximum((logits - high) - low, FLOOR)


@triton.jit
def tanh(x):
    """By exp; by its series where 1 - exp would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    decay = tl.exp(-2 * tl.abs(x))
    ratio = (1 - decay) / (1 + decay)
    return tl.where(square < 0.0225, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def minus_expm1(x):
    """1 - exp(x) for x <= 0, exact where exp(x) is nearly 1."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.2, series, 1 - tl.exp(x))


@triton.jit
def remainder(u, power, cross, gap, rate):
    """power - cross (1 + u), power = cross e^u and u = rate gap: by series where it cancels."""
    v = tl.minimum(tl.maximum(u, -1.0), 1.0)  # no inf - inf
    series = 1 + v / 10 * (1 + v / 11)
    series = 1 + v / 6 * (1 + v / 7 * (1 + v / 8 * (1 + v / 9 * series)))
    series = v * v / 2 * (1 + v / 3 * (1 + v / 4 * (1 + v / 5 * series)))
    return tl.where(tl.abs(u) < 1, cross * series, power - cross - cross * gap * rate)


@triton.jit
def terms_of(p, lp, q, lq, a, b, TERMS: tl.constexpr, HELPERS: tl.constexpr):
    """phi and g of a divergence (divergences.py), with the helpers that it needs."""
    if HELPERS == 1:
        x = tl.maximum(a * p + (1 - a) * q, TINY)
        phi, g = TERMS(p, lp, q, lq, x, tl.log(x), x, a, b)
    elif HELPERS == 2:
        gap = lp - lq
        cross = tl.exp(a * lp + b * lq)
        power = tl.exp((a + b) * lq)
        y = remainder(b * gap, tl.exp((a + b) * lp), cross, gap, b)
        z = remainder(-a * gap, power, cross, gap, -a)
        x = tl.where(tl.abs(a * gap) < 1, z - cross * gap * a, power - cross)
        phi, g = TERMS(p, lp, q, lq, x, y, z, a, b)
    else:
        phi, g = TERMS(p, lp, q, lq, p, p, p, a, b)
    return phi, g


@triton.jit
def online(top, total, first, tile, MASKED: tl.constexpr):
    """One more tile of a row's maximum `top`, `total` = sum exp(x - top) and `first` =
    sum exp(x - top) (x - top); also the factor by which older sums shrink, and the tile's
    exponentials and their sum."""
    new = tl.maximum(top, tl.max(tile, 1))
    gap = tl.maximum(top - new, NOTHING)
    shrink = tl.exp(gap)
    moved = tile - new[:, None]
    exponentials = tl.exp(moved)
    if MASKED:  # all of a tile may be
        exponentials = tl.where(tile > FLOOR, exponentials, 0.0)
    first = shrink * (first + total * gap) + tl.sum(exponentials * moved, 1)
    own = tl.sum(exponentials, 1)
    return new, shrink * total + own, first, shrink, exponentials, own


@triton.jit
def gap_of(guide, learner, MASKED: tl.constexpr):
    """teacher - student; 0 where one of them is masked: there the divergence is not finite."""
    gap = guide - learner
    if MASKED:
        gap = tl.where(tl.minimum(guide, learner) > FLOOR, gap, 0.0)
    return gap
