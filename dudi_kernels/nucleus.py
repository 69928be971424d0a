"""A teacher that is restricted to its likeliest tokens (nucleus, arXiv 1904.09751), in place.

The logits of all other tokens become -inf before the first step reads them, so that every statistic
and divergence is of the renormalised rest. The smallest logit that stays is found among the k
largest, k growing for the rows that need more; tokens that tie with it stay, so that no order among
equals matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 1024  # tokens among which the nucleus of most rows is
GROWTH = 16


def restrict(logits: Tensor, inv_tau: float, top_p: float, tile_rows: int) -> None:
    """Keep the likeliest tokens of mass `top_p` at this temperature, (R, U) a few rows at a time.

    Replaces::

        p = softmax(logits * inv_tau, -1)
        ordered = p.sort(-1, descending=True).values
        least = ordered.gather(-1, (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True) - 1)
        logits[p < least] = -inf
    """
    for part in logits.split(tile_rows):
        least = _least(part, inv_tau, top_p)
        part.masked_fill_(part < least[:, None], -torch.inf)


def _least(logits: Tensor, inv_tau: float, top_p: float) -> Tensor:  # (R,)
    """The smallest logit of each row's nucleus."""
    top = logits.amax(1, keepdim=True)
    mass = (logits - top).mul_(inv_tau).exp_().sum(1, keepdim=True, dtype=torch.float32).double()
    found = top[:, 0].clone()
    rows = torch.arange(len(logits), device=logits.device)
    count = FIRST
    while len(rows):
        count = min(count, logits.shape[1])
        own = logits if len(rows) == len(logits) else logits[rows]
        ordered = own.topk(count, 1).values
        p = ((ordered - top[rows]).mul_(inv_tau)).double().exp_().div_(mass[rows])
        needed = (p.cumsum(1) - p < top_p).sum(1)  # one at least: the first has nothing before it
        found[rows] = ordered.gather(1, needed[:, None] - 1)[:, 0]
        rows = rows[needed == count] if count < logits.shape[1] else rows[:0]
        count *= GROWTH
    return found
