"""Values of parts of the vocabulary, put together: entropy and the two KLs by the chain rule.

A part (a block of columns, or what a rank holds) has statistics and sums of its own, as if it were
all there is; with the masses of the parts they become those of the whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dudi_kernels.divergences import Measure
from dudi_kernels.tiles import STUDENT_POLE, TEACHER_POLE, RowState

SUMS = ("entropy", "teacher_entropy", "divergence")  # of log-sum-exps' precision on the way
Two = tuple[Tensor, Tensor]  # (N,) of earlier parts and of one


def widened(state: RowState) -> RowState:
    """The same state, with sums of their own that lose nothing on the way."""
    return replace(state, **{name: getattr(state, name).to(state.log_sum.dtype) for name in SUMS})


def settle(state: RowState, whole: RowState, measure: Measure | None) -> None:
    """The sums of all parts, into the state that was `widened`."""
    for name in SUMS:
        getattr(state, name).copy_(getattr(whole, name))
    if measure is None:
        return
    chain = measure.chain
    assert chain is not None
    state.g_sum.fill_(chain.offset)
    if chain.slope:  # no 0 * inf
        state.g_sum.add_(state.divergence, alpha=chain.slope)


def put_together(whole: RowState, own: RowState, measure: Measure | None) -> None:
    """A part's statistics and sums into those of earlier parts."""
    shares = _shares(whole.log_sum, own.log_sum)
    whole.entropy.copy_(_entropy((whole.entropy, own.entropy), shares))
    shares = _shares(whole.teacher_log_sum, own.teacher_log_sum)
    student = _shares(whole.tempered_log_sum, own.tempered_log_sum)
    teacher = _shares(whole.teacher_tempered_log_sum, own.teacher_tempered_log_sum)
    if measure is None:
        return
    assert measure.chain is not None
    whole.teacher_entropy.copy_(_entropy((whole.teacher_entropy, own.teacher_entropy), shares))
    first, second = (teacher, student) if measure.chain.teacher_first else (student, teacher)
    whole.divergence.copy_(_kl((whole.divergence, own.divergence), first, second))
    whole.poles.bitwise_or_(own.poles)
    for pole, masked, other in (
        (STUDENT_POLE, student[1], teacher[1]),
        (TEACHER_POLE, teacher[1], student[1]),
    ):
        hit = (masked == -torch.inf) & (other > -torch.inf)
        whole.poles.bitwise_or_(hit.int() * pole)


def _shares(whole: Tensor, own: Tensor) -> Two:
    """Logs of what earlier parts and one have of the sum, which takes the part in."""
    older = whole.clone()
    torch.logaddexp(older, own, out=whole)
    first, second = (torch.where(part == -torch.inf, part, part - whole) for part in (older, own))
    return first, second


def _entropy(entropies: Two, log_shares: Two) -> Tensor:
    """H = sum_b w_b (H_b - log w_b)."""
    older, own = (
        torch.where(w == -torch.inf, 0, w.exp() * (entropy - w))
        for entropy, w in zip(entropies, log_shares, strict=True)
    )
    return older + own


def _kl(values: Two, first: Two, second: Two) -> Tensor:
    """D = sum_b w_b (D_b + log w_b - log v_b); a part that one side masks whole has no D_b: a pole
    says what it is worth."""
    older, own = (
        torch.where((w == -torch.inf) | (v == -torch.inf), 0, w.exp() * (value + w - v))
        for value, w, v in zip(values, first, second, strict=True)
    )
    return older + own
