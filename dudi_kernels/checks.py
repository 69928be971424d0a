"""What the public functions accept: a refusal names the argument, what was wanted and what came.

What tensors hold is not looked at while a CUDA graph is captured; all else is checked as ever.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor

from dudi_kernels import devices
from dudi_kernels.autograd import leaf
from dudi_kernels.classes import Classes
from dudi_kernels.divergences import DIVERGENCES, Measure
from dudi_kernels.head import FLOATS, LMHead, as_head
from dudi_kernels.scalars import INTEGERS, POWERS, SHARES, TEMPERATURES, integer, number
from dudi_kernels.shard import VocabularyShard
from dudi_kernels.topk import Top, TopKTeacher
from dudi_kernels.verbalizer import Verbalizer

__all__ = ["integer", "number"]  # as checks of arguments

Head = LMHead | Tensor
SEGMENTS = 2**20  # so many there may be without any rows; more are not meant


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def temperature(value: float, name: str = "temperature") -> float:
    return number(name, value, *TEMPERATURES)


def temperatures(value: float, teacher: float | None) -> tuple[float, float]:
    """The student's and the teacher's; one alone is both."""
    own = temperature(value)
    return own, own if teacher is None else temperature(teacher, "teacher_temperature")


def budget(value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"memory_budget must be a number of bytes, got {value!r}")


def divergence(name: str, value: str, beta: float, alpha: float) -> Measure:
    """The divergence of that name with its parameters."""
    one_of(name, value, DIVERGENCES)
    if value in ("jsd", "jeffreys"):
        beta = number("beta", beta, *SHARES)  # jsd's limit at 0 is 0, not forward KL
    if value.startswith("skew"):
        alpha = number("alpha", alpha, *SHARES)
    if value == "alpha_beta":
        alpha, beta = number("alpha", alpha, *POWERS), number("beta", beta, *POWERS)
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

    def change(self, hidden: Callable[[Tensor], Tensor]) -> Rows:
        """With other hidden states, made of these."""
        leaves = None if self.leaves is None else self.leaves.change(hidden)
        return self._replace(hidden=hidden(self.hidden), leaves=leaves)


def side(who: str, hidden: Tensor, head: Head | None) -> Rows:
    """Check one side and flatten (..., D) to (N, D)."""
    name = f"{who}_hidden" if who else "hidden"
    head_name = f"{who}_head" if who else "head"
    if isinstance(hidden, TopKTeacher):
        raise TypeError(
            f"{name} must be a tensor: only linear_distill_loss and linear_dudi_loss take a "
            "TopKTeacher"
        )
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
    if head.shard is None:  # else ranks find out together: a slice may be masked whole
        _masks_at_most(f"{head_name}.bias", head.bias)
    rows = _flat_rows(hidden, head)
    if (own := leaf()) is not None:
        rows = rows._replace(leaves=_flat_rows(own(hidden), head.map(own)))
    return rows


def _flat_rows(hidden: Tensor, head: LMHead) -> Rows:
    flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    return Rows(flat, head, tuple(hidden.shape[:-1]))


def gradient_tolerance(value: float, student: Rows) -> None:
    number("gradient_tolerance", value, 0, 1)
    if value and student.head.shard is not None:
        raise ValueError(
            f"gradient_tolerance must be 0 with a sharded student_head, got {value}: what may be "
            "left out of a tile depends on the tiles of other ranks"
        )
    if value and devices.capturing(student.hidden.device):
        raise ValueError(
            f"gradient_tolerance must be 0 while a CUDA graph is captured, got {value}: what is "
            "launched depends on what is left out"
        )


def _masks_at_most(name: str, bias: Tensor | None) -> None:
    """Finite or -inf; looked at where that costs next to nothing: on a GPU it would wait."""
    if bias is None or bias.device.type != "cpu":
        return
    top = float(bias.detach().max())  # NaN if any is
    if not math.isfinite(top):
        raise ValueError(f"{name} must be finite, or -inf for some tokens, got a maximum of {top}")


def _same_rows(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Equal leading shapes, or one of them flat: row i belongs to row i."""
    rows, others = math.prod(wanted), math.prod(given)
    if rows != others:
        raise ValueError(f"{name} must have {rows} rows as student_hidden, got {others}")
    if given != wanted and len(given) != 1 and len(wanted) != 1:
        raise ValueError(
            f"{name} must have the leading shape {wanted} of student_hidden or be flat, got {given}"
        )


def pair_of_sides(
    student: Rows, teacher: Rows, verbalizer: Verbalizer | None = None
) -> tuple[Rows, Classes | None]:
    """The teacher's side, and the classes that the divergence is over; None: the vocabulary."""
    _same_rows("teacher_hidden", teacher.shape, student.shape)
    device, other = student.hidden.device, teacher.hidden.device
    if device != other:
        raise ValueError(f"teacher_hidden must be on {device} as student_hidden is, got {other}")
    _same_shards(student.head, teacher.head, verbalizer)
    if verbalizer is not None:
        return _verbalized(student, teacher, verbalizer)
    if student.head.vocab_size != teacher.head.vocab_size:
        raise ValueError(
            "teacher_head must have the student's vocabulary: student_head has "
            f"{student.head.vocab_size} rows, teacher_head {teacher.head.vocab_size}. If the "
            "tokenizer is the same and a head is only padded, Verbalizer.prefix compares the rows "
            "that both have; Verbalizer.from_tokenizers is for another tokenizer"
        )
    return teacher, None


def _same_shards(student: LMHead, teacher: LMHead, verbalizer: Verbalizer | None) -> None:
    """Token v of both sides is on the same rank."""
    if student.shard is None and teacher.shard is None:
        return
    if verbalizer is not None:
        raise ValueError(
            "verbalizer must be None with sharded heads: a class may have tokens of several ranks"
        )
    for one, other, who in ((student, teacher, "teacher"), (teacher, student, "student")):
        if one.shard is not None and not one.shard.same_as(other.shard):
            got = "a whole head" if other.shard is None else _slices(other.shard)
            raise ValueError(
                f"{who}_head must be sharded as the other head, {_slices(one.shard)}, got {got}"
            )


def _slices(shard: VocabularyShard) -> str:
    return f"rows from {', '.join(map(str, shard.bounds[:-1]))} to {shard.vocab_size} on ranks " + (
        ", ".join(map(str, shard.ranks))
    )


def _verbalized(
    student: Rows, teacher: Rows, verbalizer: Verbalizer
) -> tuple[Rows, Classes | None]:
    verbalizer_type(verbalizer)
    for who, side, size in (
        ("teacher", teacher, verbalizer.teacher_size),
        ("student", student, verbalizer.student_size),
    ):
        if side.head.vocab_size != size:
            raise ValueError(
                f"verbalizer must be for a {who}_head of {side.head.vocab_size} rows, got one for "
                f"{size}"
            )
    device, other = student.hidden.device, verbalizer.student_class.device
    if device != other:
        raise ValueError(
            f"verbalizer must be on {device} as student_hidden is (verbalizer.to), got {other}"
        )
    if devices.capturing(device) and "classes" not in vars(verbalizer):
        raise ValueError(
            "verbalizer must have its classes made before a CUDA graph is captured, which any loss "
            "with it does (or verbalizer.classes): that waits for the GPU"
        )
    classes = verbalizer.classes
    if classes.prefix:  # rows of the teacher's head beyond the student's, if any, are left out
        return teacher._replace(head=teacher.head.part(0, verbalizer.student_size)), None
    return teacher, classes


def verbalizer_type(value: object) -> None:
    if not isinstance(value, Verbalizer):
        raise TypeError(f"verbalizer must be a Verbalizer or None, got {type(value).__name__}")


def exact(gradient_tolerance: float, classes: Classes | None) -> None:
    if gradient_tolerance and classes is not None:
        raise ValueError(
            f"gradient_tolerance must be 0 with a verbalizer, got {gradient_tolerance}"
        )


def top_p(value: float, student: Rows) -> float:
    value = number("teacher_top_p", value, SHARES[0], 1)
    if value < 1 and student.head.shard is not None:
        raise ValueError(
            f"teacher_top_p must be 1 with a sharded student_head, got {value}: which tokens are "
            "the teacher's likeliest depends on those of other ranks"
        )
    if value < 1 and devices.capturing(student.hidden.device):
        raise ValueError(
            f"teacher_top_p must be 1 while a CUDA graph is captured, got {value}: how many tokens "
            "are looked at depends on what they are"
        )
    return value


def finite_measure(
    name: str, measure: Measure, classes: Classes | None, top_p: float = 1.0
) -> None:
    """Not one that is infinite in every row."""
    if top_p < 1 and measure.teacher_masks.phi:
        raise ValueError(
            f"{name} is infinite with teacher_top_p={top_p}: the teacher gives all but its "
            "likeliest tokens no mass at all; forward_kl, jsd and the skew divergences are finite"
        )
    if classes is not None and classes.masked and measure.teacher_masks.phi:
        raise ValueError(
            f"{name} is infinite with this verbalizer: the teacher gives the student's unmatched "
            "tokens no mass at all; unmatched='renormalize' leaves them out"
        )


def top_k(
    teacher: TopKTeacher,
    head: object,
    student: Rows,
    temperatures: tuple[float, float],
    gradient_tolerance: float,
    teacher_top_p: float,
    verbalizer: object,
) -> Top:
    if head is not None:
        raise ValueError("teacher_head must not be given with a TopKTeacher")
    for name, given, neutral in (
        ("gradient_tolerance", gradient_tolerance, 0),
        ("teacher_top_p", teacher_top_p, 1),
        ("verbalizer", verbalizer, None),
    ):
        if given != neutral:
            raise ValueError(f"{name} must be {neutral} with a TopKTeacher, got {given}")
    if student.head.shard is not None:
        raise ValueError("student_head must not be sharded with a TopKTeacher")
    if temperatures != (1.0, 1.0):
        raise ValueError(
            "temperature must be 1 with a TopKTeacher, whose log-probabilities have one of their "
            f"own, got {temperatures}"
        )
    ids, log_probs = teacher.ids.flatten(0, -2), teacher.log_probs.detach().flatten(0, -2)
    _same_rows("the TopKTeacher", tuple(teacher.ids.shape[:-1]), student.shape)
    device = student.hidden.device
    if not ids.device == log_probs.device == device:
        raise ValueError(f"the TopKTeacher must be on {device} as student_hidden is")
    size = student.head.vocab_size
    if (i := first(((ids < 0) | (ids >= size)).any(1))) is not None:
        raise ValueError(f"ids must be in [0, {size}), those of row {i} are not")
    return Top(ids.long(), log_probs)


def per_row(
    name: str, value: Tensor, rows: Rows, *, integers: bool = False, on_host: bool = False
) -> Tensor:
    """A per-row argument, flattened; shapes (N,) and the leading shape both do. `on_host`: whether
    it may be on the CPU too."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if tuple(value.shape) not in ((len(rows.hidden),), rows.shape):
        raise ValueError(f"{name} must have shape {rows.shape}, got {tuple(value.shape)}")
    if value.device != rows.hidden.device and not (on_host and value.device.type == "cpu"):
        raise ValueError(
            f"{name} must be on {rows.hidden.device} as the hidden states are, got {value.device}"
        )
    if integers and value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    if value.is_complex():
        raise TypeError(f"{name} must be real numbers, got {value.dtype}")
    flat = value.detach().reshape(-1).contiguous()
    return flat.long() if integers else flat.float()


def first(wrong: Tensor) -> int | None:
    """The first row where it is so, if the host may look."""
    if devices.capturing(wrong.device):
        return None
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def targets(value: Tensor, rows: Rows, ignore_index: int | None) -> Tensor:
    """(N,) int64 targets in range; the first bad one is named."""
    flat = per_row("targets", value, rows, integers=True)
    size = rows.head.whole_size
    wrong = (flat < 0) | (flat >= size)
    if ignore_index is not None:
        wrong &= flat != ignore_index
    if (i := first(wrong)) is not None:
        wanted = f"in [0, {size})"
        if ignore_index is not None:
            wanted += f" or ignore_index={ignore_index}"
        raise ValueError(f"targets must be {wanted}, got {int(flat[i])} at row {i}")
    return flat


def row_weight(name: str, value: Tensor, rows: Rows) -> Tensor:
    flat = per_row(name, value, rows)
    if (i := first(~((flat >= 0) & (flat < math.inf)))) is not None:
        raise ValueError(f"{name} must be finite and not negative, got {float(flat[i])} at row {i}")
    return flat


def segment_ids(value: Tensor, rows: Rows) -> Tensor:
    """(N,) int64, on the device of the hidden states or on the CPU."""
    flat = per_row("segment_ids", value, rows, integers=True, on_host=True)
    if (i := first(flat < 0)) is not None:
        raise ValueError(f"segment_ids must not be negative, got {int(flat[i])} at row {i}")
    most = max(SEGMENTS, 2 * len(flat))
    if (i := first(flat >= most)) is not None:
        raise ValueError(
            f"segment_ids must count the sequences from 0, below {most}, got {int(flat[i])} at "
            f"row {i}"
        )
    if (i := first(flat[1:] < flat[:-1])) is not None:
        raise ValueError(
            f"segment_ids must not decrease, got {int(flat[i + 1])} after {int(flat[i])} "
            f"at row {i + 1}"
        )
    return flat
