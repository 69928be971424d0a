"""What the public functions accept: a refusal names the argument, what was wanted and what came."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch import bool as torch_bool

from dudi_kernels.autograd import leaf
from dudi_kernels.divergences import DIVERGENCES, Measure
from dudi_kernels.head import FLOATS, LMHead, as_head

if TYPE_CHECKING:
    from dudi_kernels.topk import TopKTeacher

Head = LMHead | Tensor


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def number(name: str, value: float, low: float, high: float, ends: bool = True) -> None:
    """Within [low, high], or (low, high) without its ends."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    inside = low <= value <= high if ends else low < value < high
    if not inside:
        left, right = "[]" if ends and math.isfinite(high) else "[)" if ends else "()"
        raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {value}")


def temperature(value: float) -> None:
    number("temperature", value, 0, math.inf, ends=False)


def temperatures(value: float, teacher: float | None) -> tuple[float, float]:
    """The student's and the teacher's; one alone is both."""
    temperature(value)
    if teacher is None:
        return value, value
    number("teacher_temperature", teacher, 0, math.inf, ends=False)
    return value, teacher


def budget(value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"memory_budget must be a number of bytes, got {value!r}")


def gradient_tolerance(value: float) -> None:
    number("gradient_tolerance", value, 0, 1)


def divergence(name: str, value: str, beta: float, alpha: float) -> Measure:
    """The divergence of that name with its parameters."""
    one_of(name, value, DIVERGENCES)
    if value in ("jsd", "jeffreys"):
        number("beta", beta, 0, 1, ends=False)  # jsd's limit at 0 is 0, not forward KL
    if value.startswith("skew"):
        number("alpha", alpha, 0, 1, ends=False)
    if value == "alpha_beta":
        number("alpha", alpha, 0, math.inf, ends=False)
        number("beta", beta, 0, math.inf, ends=False)
    return DIVERGENCES[value].measure(beta, alpha)


class Rows(NamedTuple):
    """One side's inputs, flattened."""

    hidden: Tensor  # (N, D)
    head: LMHead
    shape: tuple[int, ...]  # what per-row results come back in
    low: Tensor | None = None  # (N, r) scaling h A^T, where the head has a LoRA
    leaves: Rows | None = None  # that the gradients go to instead, inside of `fp32_gradients`

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What gradients may be wanted for: of hidden states, weight, bias, low and B."""
        own = self.leaves or self
        b = None if own.head.lora is None else own.head.lora.b
        return own.hidden, own.head.weight, own.head.bias, own.low, b

    def pick(self, index: Tensor) -> Rows:
        leaves = None if self.leaves is None else self.leaves.pick(index)
        return self._replace(hidden=self.hidden.index_select(0, index), leaves=leaves)


def side(who: str, hidden: Tensor, head: Head | None) -> Rows:
    """Check one side and flatten (..., D) to (N, D)."""
    name = f"{who}_hidden" if who else "hidden"
    head_name = f"{who}_head" if who else "head"
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(hidden).__name__}")
    head = as_head(head, head_name)
    if hidden.ndim < 2:
        raise ValueError(f"{name} must have shape (..., D), got {tuple(hidden.shape)}")
    if hidden.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {hidden.dtype}")
    if hidden.shape[-1] != head.width:
        raise ValueError(
            f"{name} must have width {head.width} as {head_name} has, got {hidden.shape[-1]}"
        )
    if hidden.device != head.weight.device:
        raise ValueError(
            f"{name} must be on {head.weight.device} as {head_name} is, got {hidden.device}"
        )
    rows = _flat_rows(hidden, head)
    if (own := leaf()) is not None:
        rows = rows._replace(leaves=_flat_rows(own(hidden), head.map(own)))
    return rows


def _flat_rows(hidden: Tensor, head: LMHead) -> Rows:
    flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    return Rows(flat, head, tuple(hidden.shape[:-1]))


def pair_of_sides(student: Rows, teacher: Rows) -> None:
    rows, others = len(student.hidden), len(teacher.hidden)
    if rows != others:
        raise ValueError(f"teacher_hidden must have {rows} rows as student_hidden, got {others}")
    device, other = student.hidden.device, teacher.hidden.device
    if device != other:
        raise ValueError(f"teacher_hidden must be on {device} as student_hidden is, got {other}")
    if student.head.vocab_size != teacher.head.vocab_size:
        raise ValueError(
            "teacher_head must have the student's vocabulary: student_head has "
            f"{student.head.vocab_size} rows, teacher_head {teacher.head.vocab_size}. If the "
            "tokenizer is the same and a head is only padded, cut or resize one to the other's size"
        )


def top_k(
    teacher: TopKTeacher, head: object, student: Rows, temperatures: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """(N, k) ids and float64 log-probabilities."""
    if head is not None:
        raise ValueError("teacher_head must not be given with a TopKTeacher")
    if temperatures != (1.0, 1.0):
        raise ValueError(
            "temperature must be 1 with a TopKTeacher, whose log-probabilities have one of their "
            f"own, got {temperatures}"
        )
    ids, log_probs = teacher.ids.flatten(0, -2), teacher.log_probs.detach().flatten(0, -2)
    if len(ids) != len(student.hidden):
        raise ValueError(
            f"the TopKTeacher must have {len(student.hidden)} rows as student_hidden, "
            f"got {len(ids)}"
        )
    device = student.hidden.device
    if not ids.device == log_probs.device == device:
        raise ValueError(f"the TopKTeacher must be on {device} as student_hidden is")
    size = student.head.vocab_size
    if (i := _first(((ids < 0) | (ids >= size)).any(1))) is not None:
        raise ValueError(f"ids must be in [0, {size}), those of row {i} are not")
    return ids.long(), log_probs.double()


def per_row(name: str, value: Tensor, rows: Rows, integers: bool = False) -> Tensor:
    """A per-row argument, flattened; shapes (N,) and the leading shape both do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if tuple(value.shape) not in ((len(rows.hidden),), rows.shape):
        raise ValueError(f"{name} must have shape {rows.shape}, got {tuple(value.shape)}")
    if value.device != rows.hidden.device:
        raise ValueError(
            f"{name} must be on {rows.hidden.device} as the hidden states are, got {value.device}"
        )
    if integers and (value.is_floating_point() or value.dtype == torch_bool):
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    flat = value.detach().reshape(-1).contiguous()
    return flat.long() if integers else flat.float()


def _first(wrong: Tensor) -> int | None:
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def targets(value: Tensor, rows: Rows, ignore_index: int | None) -> Tensor:
    """(N,) int64 targets in range; the first bad one is named."""
    flat = per_row("targets", value, rows, integers=True)
    wrong = (flat < 0) | (flat >= rows.head.vocab_size)
    if ignore_index is not None:
        wrong &= flat != ignore_index
    if (i := _first(wrong)) is not None:
        wanted = f"in [0, {rows.head.vocab_size})"
        if ignore_index is not None:
            wanted += f" or ignore_index={ignore_index}"
        raise ValueError(f"targets must be {wanted}, got {int(flat[i])} at row {i}")
    return flat


def token_weight(value: Tensor, rows: Rows) -> Tensor:
    flat = per_row("token_weight", value, rows)
    if (i := _first(~((flat >= 0) & (flat < math.inf)))) is not None:
        raise ValueError(
            f"token_weight must be finite and not negative, got {float(flat[i])} at row {i}"
        )
    return flat


def segment_ids(value: Tensor, rows: Rows) -> Tensor:
    flat = per_row("segment_ids", value, rows, integers=True)
    if (i := _first(flat < 0)) is not None:
        raise ValueError(f"segment_ids must not be negative, got {int(flat[i])} at row {i}")
    if (i := _first(flat[1:] < flat[:-1])) is not None:
        raise ValueError(
            f"segment_ids must not decrease, got {int(flat[i + 1])} after {int(flat[i])} "
            f"at row {i + 1}"
        )
    return flat
