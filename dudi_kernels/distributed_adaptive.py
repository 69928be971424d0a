"""A row's own weight of forward KL (adaptive.py), where each rank has a slice of the vocabulary.

The teacher's head ends at the same token as in one process. Ranks show one another their likeliest
few probabilities; together they tell the least one inside of the head, unless all that a rank has
shown is: it then shows more. Of equals the first ones in the vocabulary are inside, so ranks count
theirs. The gap |p - q| is summed last.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dudi_kernels import devices
from dudi_kernels.adaptive import FIRST, GROWTH
from dudi_kernels.divergences import HEAD_MASS
from dudi_kernels.shard import VocabularyShard
from dudi_kernels.tiles import RowState, Setting, log_probs

Logits = tuple[Tensor, Tensor]  # (R, B) the student's and the teacher's, of this rank's tokens


def set_mixture(
    shard: VocabularyShard, setting: Setting, state: RowState, logits: Logits, first_row: int
) -> None:
    """The step *mixture*, of rows whose log-sum-exps are those of the whole vocabulary."""
    if devices.capturing(state.weight.device):
        raise ValueError(
            "adaptive_kl with a sharded head can't be captured in a CUDA graph: how many "
            "probabilities the ranks exchange depends on what they are"
        )
    assert state.mixture is not None
    rows = _Rows(setting, state, logits, first_row)
    edge, equals = _edge(shard, rows)
    counts = torch.cat([(p == edge[own]).sum(1) for own, p in rows.teacher()])
    earlier = shard.gather(counts)[: shard.rank].sum(0)
    gaps = torch.cat([_gaps(p, q, edge[own], (equals - earlier)[own]) for own, p, q in rows.both()])
    inside, whole = shard.gather(gaps).sum(0).unbind(1)
    share = torch.where(whole == 0, 0.5, inside / whole)  # a NaN stays one
    state.mixture[first_row : first_row + len(share)] = share


class _Rows:
    """Probabilities, made a tile of rows at a time: (rows, p) or (rows, p, q)."""

    def __init__(self, setting: Setting, state: RowState, logits: Logits, first_row: int):
        self.setting, self.state, self.logits, self.first_row = setting, state, logits, first_row

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows of the logits, and of the state."""
        rows, step = len(self.logits[0]), max(1, self.setting.tile_rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield slice(start, stop), slice(self.first_row + start, self.first_row + stop)

    def _teacher(self, local: slice, own: slice) -> Tensor:
        setting, log_sum = self.setting, self.state.teacher_tempered_log_sum[own]
        logits = self.logits[1][local]
        return log_probs(logits, log_sum, setting.teacher_inv_tau, setting.masked).exp_()

    def teacher(self) -> Iterator[tuple[slice, Tensor]]:
        for local, own in self._tiles():
            yield local, self._teacher(local, own)

    def both(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        setting = self.setting
        for local, own in self._tiles():
            log_sum, logits = self.state.tempered_log_sum[own], self.logits[0][local]
            q = log_probs(logits, log_sum, setting.inv_tau, setting.masked).exp_()
            yield local, self._teacher(local, own), q


def _edge(shard: VocabularyShard, rows: _Rows) -> tuple[Tensor, Tensor]:
    """(R, 1) the least probability in the head, and (R,) how many tokens of it are inside."""
    wide = rows.state.log_sum.dtype
    size = 0
    while True:
        size = min(size * GROWTH or FIRST, shard.largest)
        top = torch.cat([_top(p, size) for _, p in rows.teacher()])
        shown = shard.gather(top)  # (ranks, R, size)
        merged = shown.transpose(0, 1).flatten(1).sort(1, descending=True).values
        inside = merged.clamp(min=0).cumsum(1, dtype=wide) <= HEAD_MASS
        count = inside.masked_fill_(merged < 0, False).sum(1, keepdim=True).clamp_(min=1)
        edge = merged.gather(1, count - 1)
        if size == shard.largest or not bool((shown[..., -1] >= edge[:, 0]).any()):
            break
    return edge, (count - (merged > edge).sum(1, keepdim=True))[:, 0]


def _top(p: Tensor, size: int) -> Tensor:
    """(R, size) the largest; -1 where there are no more."""
    found = p.topk(min(size, p.shape[1]), 1).values
    return F.pad(found, (0, size - found.shape[1]), value=-1.0)


def _gaps(p: Tensor, q: Tensor, edge: Tensor, equals: Tensor) -> Tensor:
    """(R, 2) sum |p - q| of this rank's tokens in the head, of which `equals` are at its edge, and
    of all its tokens."""
    gap = (p - q).abs_()
    equal = p == edge
    first = equal & (equal.cumsum(1, dtype=torch.int32) <= equals[:, None])
    inside = torch.where((p > edge) | first, gap, 0)
    return torch.stack([inside.sum(1), gap.sum(1)], 1)
