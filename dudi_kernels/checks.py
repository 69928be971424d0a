"""What the public functions accept: every refusal names the argument, what was wanted, what came."""

from __future__ import annotations

import difflib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi_kernels.divergences import DIVERGENCES, Divergence
from dudi_kernels.head import LMHead, as_head

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def one_of(name: str, value: object, allowed: Any) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def number(name: str, value: float, low: float, high: float, open_ends: bool = False) -> None:
    if not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    inside = low < value < high if open_ends else low <= value <= high
    if not inside:
        brackets = "()" if open_ends else "[]"
        raise ValueError(f"{name} must be in {brackets[0]}{low}, {high}{brackets[1]}, got {value}")


def temperature(name: str, value: float) -> None:
    number(name, value, 0, math.inf, open_ends=True)


def divergence(name: str, value: str, beta: float, alpha: float) -> tuple[Divergence, float | None]:
    """The divergence and the teacher's share of its mixture."""
    one_of(name, value, DIVERGENCES)
    if value == "jsd":
        number("beta", beta, 0, 1, open_ends=True)  # its limit at 0 is 0, not forward KL
    if value.startswith("skew"):
        number("alpha", alpha, 0, 1, open_ends=True)
    chosen = DIVERGENCES[value]
    return chosen, chosen.teacher_share(beta, alpha)


class Rows(NamedTuple):
    """One side's inputs, flattened and brought to one dtype."""

    hidden: Tensor  # (N, D)
    head: LMHead
    shape: torch.Size  # what per-row outputs come back in


def side(who: str, hidden: Tensor, head: LMHead | Tensor) -> Rows:
    """Check one side and flatten (..., D) to (N, D)."""
    name = f"{who}_hidden" if who else "hidden"
    head_name = f"{who}_head" if who else "head"
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(hidden).__name__}")
    head = as_head(head, head_name)
    if hidden.ndim < 2:
        raise ValueError(f"{name} must have shape (..., D), got {tuple(hidden.shape)}")
    for label, tensor in ((name, hidden), (head_name, head.weight)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{label} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if hidden.shape[-1] != head.width:
        raise ValueError(
            f"{name} must have width {head.width} as {head_name} has, got {hidden.shape[-1]}"
        )
    if hidden.device != head.weight.device:
        raise ValueError(f"{name} is on {hidden.device}, {head_name} on {head.weight.device}")
    return Rows(hidden.reshape(-1, hidden.shape[-1]), head, hidden.shape[:-1])


def same_rows(student: Rows, teacher: Rows) -> None:
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(
            f"teacher_hidden must have as many rows as student_hidden, {len(student.hidden)}, "
            f"got {len(teacher.hidden)}"
        )
    if student.hidden.device != teacher.hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher.hidden.device}, student_hidden on {student.hidden.device}"
        )
    if student.head.vocab_size != teacher.head.vocab_size:
        raise ValueError(
            "teacher and student must share a vocabulary: student_head has "
            f"{student.head.vocab_size} rows, teacher_head {teacher.head.vocab_size}. If one "
            "tokenizer's head is only padded, cut or resize one of them to the other's size"
        )


def per_row(name: str, value: Tensor, rows: Rows) -> Tensor:
    """A per-row argument, flattened; shapes (N,) and the leading shape both do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if tuple(value.shape) not in ((len(rows.hidden),), tuple(rows.shape)):
        raise ValueError(f"{name} must have shape {tuple(rows.shape)}, got {tuple(value.shape)}")
    if value.device != rows.hidden.device:
        raise ValueError(f"{name} is on {value.device}, the hidden states on {rows.hidden.device}")
    return value.reshape(-1)


def targets(value: Tensor, rows: Rows, ignore_index: int | None) -> Tensor:
    """(N,) int64 targets in range; the first bad one is named."""
    flat = per_row("targets", value, rows)
    if flat.is_floating_point() or flat.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {flat.dtype}")
    flat = flat.long()
    wrong = (flat < 0) | (flat >= rows.head.vocab_size)
    if ignore_index is not None:
        wrong &= flat != ignore_index
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {rows.head.vocab_size}) or ignore_index={ignore_index}, "
            f"got {int(flat[i])} at row {i}"
        )
    return flat


def token_weight(value: Tensor, rows: Rows) -> Tensor:
    flat = per_row("token_weight", value, rows).float()
    wrong = ~(flat >= 0)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"token_weight must not be negative or NaN, got {float(flat[i])} at row {i}")
    return flat.detach()


def segment_ids(value: Tensor, rows: Rows) -> Tensor:
    flat = per_row("segment_ids", value, rows)
    if flat.is_floating_point() or flat.dtype == torch.bool:
        raise TypeError(f"segment_ids must be integers, got {flat.dtype}")
    flat = flat.long()
    if len(flat) and (int(flat[0]) < 0 or bool((flat[1:] < flat[:-1]).any())):
        raise ValueError("segment_ids must be non-negative and must not decrease")
    return flat
