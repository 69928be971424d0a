"""A sparse map by its columns: the rows and weights of column k lie at indptr[k]:indptr[k + 1].

Rows rise within a column and none is there twice. Sums are in float64, what is stored in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.scalars import INTEGERS

SLACK = 1e-6  # by which rounded weights of a row may sum to more than 1


class Columns(NamedTuple):
    """A map of U rows and K columns."""

    indptr: Tensor  # (K + 1,) int64
    ids: Tensor  # (nnz,) int64, rows
    weights: Tensor  # (nnz,) float32

    @property
    def column(self) -> Tensor:  # (nnz,)
        """The column of each weight."""
        sizes = self.indptr.diff()
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def row_sums(self, rows: int) -> Tensor:  # (rows,) float64
        sums = torch.zeros(rows, dtype=torch.float64, device=self.weights.device)
        return sums.index_add_(0, self.ids, self.weights.double())

    def keep(self, kept: Tensor) -> Columns:  # (nnz,) bool
        """Without the weights that are not kept."""
        counts = torch.bincount(self.column[kept], minlength=len(self.indptr) - 1)
        return Columns(_indptr(counts), self.ids[kept], self.weights[kept])


def _indptr(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def by_columns(ids: Tensor, columns: Tensor, weights: Tensor, num_columns: int) -> Columns:
    """Sorted; what is there twice adds up."""
    order = torch.argsort(ids, stable=True)
    order = order[torch.argsort(columns[order], stable=True)]
    ids, columns, weights = ids[order], columns[order], weights[order].double()
    fresh = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    fresh[1:] = (ids[1:] != ids[:-1]) | (columns[1:] != columns[:-1])
    place = fresh.long().cumsum(0) - 1
    sums = torch.zeros(int(fresh.sum()), dtype=torch.float64, device=ids.device)
    sums.index_add_(0, place, weights)
    counts = torch.bincount(columns[fresh], minlength=num_columns)
    return Columns(_indptr(counts), ids[fresh], sums.float())


def product(left: Columns, right: Columns, rows: int, inner: int) -> Columns:
    """`left @ right`, of (rows, inner) and (inner, K); rows sum to at most 1 as theirs do."""
    order = torch.argsort(right.ids, stable=True)  # by rows of `right`
    counts = torch.bincount(right.ids, minlength=inner)
    begins = counts.cumsum(0) - counts
    middle = left.column
    repeats = counts[middle]
    entry = torch.arange(len(middle), device=middle.device).repeat_interleave(repeats)
    within = torch.arange(len(entry), device=middle.device)
    within = within - (repeats.cumsum(0) - repeats)[entry]
    partner = order[begins[middle[entry]] + within]
    weights = left.weights.double()[entry] * right.weights.double()[partner]
    ids = left.ids[entry]
    sums = torch.zeros(rows, dtype=torch.float64, device=ids.device).index_add_(0, ids, weights)
    weights = weights / sums.clamp(min=1)[ids]  # slack would grow with every product
    return by_columns(ids, right.column[partner], weights, len(right.indptr) - 1)


def from_lists(
    teacher_ids: Tensor | Sequence[int],  # (n,)
    student_ids: Tensor | Sequence[int],  # (n,)
    weights: Tensor | Sequence[float],  # (n,)
    teacher_size: int,
    student_size: int,
) -> Columns:
    """Checked and sorted."""
    rows = _indices("teacher_ids", teacher_ids)
    columns = _indices("student_ids", student_ids)
    weights = torch.as_tensor(weights, device=rows.device)
    for name, value in (("student_ids", columns), ("weights", weights)):
        if value.shape != rows.shape:
            wanted = tuple(rows.shape)
            raise ValueError(
                f"{name} must have shape {wanted} as teacher_ids, got {tuple(value.shape)}"
            )
    check_range("teacher_ids", rows, 0, teacher_size)
    check_range("student_ids", columns, 0, student_size)
    check_weights("weights", weights)
    return by_columns(rows, columns, weights, student_size)


def _indices(name: str, value: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(value)
    if ids.numel() == 0:
        ids = ids.long()
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {tuple(ids.shape)}")
    return ids.long()


def check_range(name: str, ids: Tensor, low: int, high: int) -> None:
    """In [low, high); the first that is not is named."""
    wrong = ((ids < low) | (ids >= high)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"{name} must be in [{low}, {high}), got {int(ids[i])} at {i}")


def check_weights(name: str, weights: Tensor) -> None:
    wrong = (~((weights >= 0) & (weights < torch.inf))).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"{name} must be finite and not negative, got {float(weights[i])} at {i}")


def check_columns(matrix: Columns, rows: int) -> None:
    """The form that is promised above, and rows that sum to at most 1."""
    indptr, ids, weights = matrix
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(ids) or bool((indptr.diff() < 0).any()):
        raise ValueError(
            f"indptr must rise from 0 to {len(ids)}, the number of weights, got "
            f"{int(indptr[0])} to {int(indptr[-1])}"
        )
    check_range("teacher_ids", ids, 0, rows)
    check_weights("weights", weights)
    column = matrix.column
    falls = ((column[1:] == column[:-1]) & (ids[1:] <= ids[:-1])).nonzero()
    if len(falls):
        i = int(falls[0])
        raise ValueError(
            f"teacher_ids must rise within a class, got {int(ids[i + 1])} after {int(ids[i])} in "
            f"class {int(column[i])}"
        )
    sums = matrix.row_sums(rows)
    full = (sums > 1 + SLACK).nonzero()
    if len(full):
        token = int(full[0])
        raise ValueError(
            "weights must sum to at most 1 for each teacher token, those of token "
            f"{token} sum to {float(sums[token]):.6g}"
        )
