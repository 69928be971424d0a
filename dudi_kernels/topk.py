"""A teacher that is known by its k likeliest tokens alone, as caches and servers give it.

It takes the place of a teacher's hidden states and head. The divergence is over k + 1 classes: the
k tokens, and one bucket with the rest of the vocabulary, whose mass is exact on both sides
(topk_steps.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.scalars import INTEGERS, integer

SLACK = 1e-3  # by which rounded probabilities may sum to more than 1


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """The k likeliest tokens of each row and their log-probabilities.

    In the place of a teacher's hidden states it makes of the divergence's p and q::

        p, q = log_probs.exp(), q.gather(-1, ids)
        p, q = (cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))

    A row whose log-probabilities are all -inf is one that the teacher says nothing of: it has no
    divergence, whatever its weight.

    Args:
        ids: (..., k) int64, no token twice in a row.
        log_probs: (..., k) nats, at the temperature that the student is to be compared at.

    Raises:
        TypeError, ValueError: shapes or types that don't fit; log-probabilities that are positive,
            NaN, or sum to more than 1; a token twice in a row.
    """

    ids: Tensor
    log_probs: Tensor

    def __post_init__(self) -> None:
        for name in ("ids", "log_probs"):
            if not isinstance(value := getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if self.ids.dtype not in INTEGERS or not self.log_probs.is_floating_point():
            got = f"{self.ids.dtype} and {self.log_probs.dtype}"
            raise TypeError(f"ids must be integers and log_probs floating-point, got {got}")
        if self.ids.shape != self.log_probs.shape or self.ids.ndim < 2 or not self.ids.shape[-1]:
            raise ValueError(
                "ids and log_probs must have one shape (..., k) with k > 0, got "
                f"{tuple(self.ids.shape)} and {tuple(self.log_probs.shape)}"
            )
        if torch.compiler.is_compiling():  # the operator makes it again, and checks the values
            return
        ordered = self.ids.flatten(0, -2).sort(-1).values
        if bool((twice := (ordered[:, 1:] == ordered[:, :-1]).any(-1)).any()):
            raise ValueError(f"ids must not name a token twice, row {int(twice.nonzero()[0])} does")
        total = self.log_probs.detach().double().exp().sum(-1).flatten()
        wrong = ~((self.log_probs.flatten(0, -2) <= SLACK).all(-1) & (total <= 1 + SLACK))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"log_probs must be those of at most all the mass, row {row} sums to {total[row]}"
            )

    def to(self, device: torch.device | str | None) -> TopKTeacher:
        """Itself where it is there already."""
        ids, log_probs = self.ids.to(device), self.log_probs.to(device)
        there = ids is self.ids and log_probs is self.log_probs
        return self if there else TopKTeacher(ids, log_probs)

    def spread(self, index: Tensor, rows: int) -> TopKTeacher:
        """The teacher of `rows` rows, of which it knows those that `index` (P,) names.

        Raises:
            TypeError, ValueError: `index` is not one of P different rows, `rows` is no count.
        """
        ids, log_probs = self.ids.flatten(0, -2), self.log_probs.flatten(0, -2)
        known, k = ids.shape
        rows = integer("rows", rows, known)
        if not isinstance(index, Tensor) or index.dtype not in INTEGERS:
            raise TypeError(f"index must be a tensor of integers, got {index!r}")
        own = index.long()
        if own.shape != (known,) or own.unique().numel() < known:
            raise ValueError(
                f"index must name {known} different rows, got {tuple(own.shape)} of which "
                f"{own.unique().numel()} differ"
            )
        if known and not 0 <= int(own.min()) <= int(own.max()) < rows:
            raise ValueError(
                f"index must be in [0, {rows}), got {int(own.min())} to {int(own.max())}"
            )
        names = torch.arange(k, dtype=ids.dtype, device=ids.device).expand(rows, k)
        nothing = log_probs.new_full((rows, k), -torch.inf)
        return TopKTeacher(names.index_copy(0, own, ids), nothing.index_copy(0, own, log_probs))


class Top(NamedTuple):
    """What a sweep needs of it, flattened."""

    ids: Tensor  # (N, k) int64
    log_probs: Tensor  # (N, k)
