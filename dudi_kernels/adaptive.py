"""A row's own weight of forward KL beside reverse KL: adaptive KL, arXiv 2404.02657.

The teacher's head is its likeliest tokens, as many as together have at most half of the mass, and
the likeliest one in any case; the rest is its tail. Forward KL gets the head's share of the gap
sum |p - q|, reverse KL the tail's. The head of most rows is short, so a few of the largest
probabilities tell where it ends; no row is sorted whole unless the teacher is nearly uniform there,
or a CUDA graph is captured: how long a head is can't be asked then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dudi_kernels import devices
from dudi_kernels.divergences import HEAD_MASS
from dudi_kernels.tiles import RowState, Setting, Tile, log_probs

FIRST = 64  # tokens that are looked at first
GROWTH = 16  # times as many where the head is longer


def forward_share(
    p: Tensor,  # (R, V) whole rows
    q: Tensor,  # (R, V)
    tail: int = 0,  # last columns that belong to the tail, whatever they are
) -> Tensor:  # (R,)
    """a of a KL(p || q) + (1 - a) KL(q || p); a constant, 1/2 between equals.

    Replaces::

        p, order = p.sort(-1, descending=True, stable=True)
        gap = (p - q.gather(-1, order)).abs()
        head = p.cumsum(-1) <= 0.5
        head[:, 0] = True
        a = (gap * head).sum(-1) / gap.sum(-1)
    """
    named = p.shape[1] - tail
    gap = (p - q).abs_()
    total = gap.sum(1)
    gap[:, :named].masked_fill_(_tail(p[:, :named]), 0)
    share = gap[:, :named].sum(1) / total
    return torch.where(total == 0, 0.5, share)  # a NaN stays one


def _tail(p: Tensor) -> Tensor:
    """(R, V) whether a token is outside of the head; of equals the first ones are inside."""
    edge, equals, torn = _edge(p)
    outside = p < edge
    if torn:  # costs more, and is rare
        equal = p == edge
        outside |= equal & (equal.cumsum(1, dtype=torch.int32) > equals)
    return outside


def _edge(p: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(R, 1) the least probability in the head, (R, 1) how many tokens of it are inside, and
    whether any more are outside."""
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    blind = devices.capturing(p.device)
    size = p.shape[1] if blind else 0
    while True:
        size = min(size * GROWTH or FIRST, p.shape[1])
        top = p.topk(size, 1).values
        inside = top.cumsum(1, dtype=wide) <= HEAD_MASS
        if size == p.shape[1] or not bool(inside[:, -1].any()):
            break
    count = inside.sum(1, keepdim=True).clamp_(min=1)
    edge = top.gather(1, count - 1)
    equals = count - (top > edge).sum(1, keepdim=True)
    torn = (p == edge).sum(1, keepdim=True) > equals
    return edge, equals, blind or bool(torn.any())


def mix(setting: Setting, state: RowState, tile: Tile) -> None:
    """The step *mixture* of a tile of whole rows; its temporaries are as large as the tile."""
    assert state.mixture is not None and tile.teacher is not None
    own = tile.own
    p, q = (
        log_probs(logits, log_sum[own], inv_tau, setting.masked).exp_()
        for logits, log_sum, inv_tau in (
            (tile.teacher, state.teacher_tempered_log_sum, setting.teacher_inv_tau),
            (tile.student, state.tempered_log_sum, setting.inv_tau),
        )
    )
    state.mixture[own] = forward_share(p, q)
