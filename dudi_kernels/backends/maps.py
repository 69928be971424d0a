"""Maps between tokens and classes, in plain torch: gathers and sums of fixed order, no atomics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dudi_kernels.classes import Classes, Group, Shared


def class_logits(
    groups: Sequence[Group],
    logits: Tensor,  # (R, U) of tokens
    inv_tau: float,
    out: Tensor,  # (R, K)
) -> None:
    """log sum_u M_uk exp(inv_tau logits_u)."""
    for group in groups:
        found = logits.index_select(1, group.members.view(-1)).unflatten(1, (-1, group.width))
        if inv_tau != 1.0:
            found.mul_(inv_tau)
        if group.log_weights is not None:
            found.add_(group.log_weights)
        own = found[..., 0] if group.width == 1 else found.logsumexp(2)
        out.index_copy_(1, group.classes, own)


def shares(
    shared: Shared,
    logits: Tensor,  # (R, V) of tokens
    inv_tau: float,
    class_logits: Tensor,  # (R, K)
    out: Tensor,  # (R, n)
) -> None:
    """exp(inv_tau logits_v - class_logits_k): what a token has of its class."""
    if not len(shared.tokens):
        return
    torch.index_select(logits, 1, shared.tokens, out=out)
    out.mul_(inv_tau).sub_(class_logits.index_select(1, shared.classes)).exp_()
    out.nan_to_num_(0)  # a class that is masked whole


def pull(
    classes: Classes,
    grad: Tensor,  # (R, K) of the class logits
    shares: Tensor,  # (R, n)
    inv_tau: float,
    out: Tensor,  # (R, V)
) -> None:
    """The gradient of the class logits in those of the tokens."""
    torch.index_select(grad, 1, classes.student_class, out=out)
    if len(classes.shared.tokens):
        shared = grad.index_select(1, classes.shared.classes).mul_(shares)
        out.index_copy_(1, classes.shared.tokens, shared)
    if len(classes.excluded):
        out.index_fill_(1, classes.excluded, 0)
    if inv_tau != 1.0:
        out.mul_(inv_tau)
