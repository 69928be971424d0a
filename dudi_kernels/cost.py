"""plan_memory: what a fused loss will cost, from shapes alone, before anything runs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dudi_kernels import checks
from dudi_kernels.divergences import Measure
from dudi_kernels.head import FLOATS
from dudi_kernels.plan import (
    BLOCK,
    DEFAULT_BUDGET,
    FP32,
    TEMPORARIES,
    TOP_BYTES,
    ClassSizes,
    Packing,
    class_row_bytes,
    copied_rows,
)
from dudi_kernels.prepare import Problem, layout, pick_backend
from dudi_kernels.sweep import even
from dudi_kernels.verbalizer import Verbalizer


class MemoryPlan(NamedTuple):
    """A fused loss, forward and backward."""

    strategy: str  # "retain" or "recompute"
    chunk_rows: int  # rows at a time
    block_columns: int  # columns at a time
    flops: int  # of the GEMMs
    bytes_moved: int  # heads, gradients and logits, once for each pass that reads or writes them
    workspace: int  # bytes beyond inputs, gradients, results and O(N) vectors
    gradients: int  # bytes of the fp32 sums
    peak: int  # bytes beyond inputs, results and O(N) vectors


def plan_memory(
    rows: int,  # N
    vocab_size: int,  # V
    width: int,  # D
    teacher_width: int | None = None,  # E; None: no teacher, or one of likeliest tokens
    *,
    per_row: bool = False,
    divergence: str = "forward_kl",
    top_k: int | None = None,
    dtype: torch.dtype = torch.float32,
    train_hidden: bool = True,
    train_weight: bool = True,
    verbalizer: Verbalizer | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    memory_budget: int = DEFAULT_BUDGET,
) -> MemoryPlan:
    """FLOPs, bytes moved, workspace and gradient bytes of a fused loss.

    Args:
        vocab_size: of a head that ranks share, the rows of the largest slice.
        per_row: of `linear_distill`, `linear_log_prob` and the like (strategy *recompute*), rather
            than of a scalar loss (*retain*, or *recompute* where kernels make that cheaper).
        top_k: k of a `TopKTeacher`, in place of `teacher_width`.
        dtype: of hidden states and weights; half precision is converted block by block on a CPU
            (bf16 on one with AMX is not).
        train_hidden, train_weight: which gradients are wanted.
        verbalizer: that the divergence has; of `vocab_size` tokens of the student.

    Returns:
        `MemoryPlan`, in FLOPs and bytes. With compiled steps `peak` is what is measured, within
        10 % (20 % with a `top_k` of a thousand or more); without them it is an upper bound.

    Raises:
        ValueError, TypeError: sizes, names or types that don't fit; a budget that does not hold one
            row or column: it says the least that works.
    """
    checks.integer("rows", rows, 0)
    checks.integer("vocab_size", vocab_size, 1)
    widths: tuple[int, ...] = (checks.integer("width", width, 1),)
    if teacher_width is not None:
        widths += (checks.integer("teacher_width", teacher_width, 1),)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be torch.float32, bfloat16 or float16, got {dtype!r}")
    checks.budget(memory_budget)
    measure = checks.divergence("divergence", divergence, 0.5, 0.5)
    k = _top_k(top_k, vocab_size, teacher_width, per_row)
    place = _device(device)
    module = pick_backend(backend, place)
    taught = [] if teacher_width is None else [measure]
    stepped: list[Measure | None] = (
        [None] if k else [measure]
    )  # the steps see no divergence of likeliest tokens
    both, alone = (layout(place, own, {dtype}, stepped, module) for own in (widths, widths[:1]))
    sizes = _class_sizes(verbalizer, vocab_size, teacher_width, both["temporaries"])
    problem = Problem(
        place,
        rows,
        vocab_size,
        widths,
        dtype,
        taught,
        both,
        alone,
        module,
        memory_budget,
        sizes,
        top_k=k,
    )
    call = _Call(
        rows,
        vocab_size,
        widths,
        dtype.itemsize,
        both["convert"],
        both["packing"],
        train_hidden,
        train_weight,
        sizes,
        k,
    )
    if sizes is not None:
        return _over_classes(call, problem, per_row)
    if not per_row:
        plan = problem.retain()
        per_row = problem.streams(plan)
    if per_row:
        return _by_block(call, problem, once=not taught or measure.chain is not None)
    return _retain(call, even(rows, plan.chunk_rows), plan.tile_rows * both["temporaries"])


def _by_block(call: _Call, problem: Problem, once: bool) -> MemoryPlan:
    """Of *recompute*, whose forward pass goes over the vocabulary `once`, or over rows."""
    block, tile_rows = problem.recompute()
    device, sides, temporaries = problem.device, len(call.widths), problem.both["temporaries"]
    cell, partials = problem.backend.stream_bytes(
        device, problem.dtype, call.rows, call.vocab_size, sides
    )
    once = once or problem.by_rows
    stream = _Stream(block, tile_rows * temporaries, cell, partials, not once)
    by_block = _recompute(call, stream, problem.backend.fuses(device))
    if not problem.by_rows:
        return by_block
    plan = problem.retain()
    quiet = call._replace(train_hidden=False, train_weight=False)
    chunk_rows = even(call.rows, plan.chunk_rows)
    by_row = _retain(quiet, chunk_rows, plan.tile_rows * temporaries).workspace
    return by_block._replace(
        workspace=max(by_block.workspace, by_row), peak=max(by_block.peak, by_row)
    )


def _top_k(value: int | None, vocab_size: int, teacher_width: int | None, per_row: bool) -> int:
    if value is None:
        return 0
    if teacher_width is not None or per_row:
        raise ValueError(
            f"top_k must be None with teacher_width or per_row, got {value}: a TopKTeacher takes "
            "the place of a teacher's side, in scalar losses"
        )
    if checks.integer("top_k", value, 1) > vocab_size:
        raise ValueError(f"top_k must be at most {vocab_size}, got {value}")
    return value


def _device(value: torch.device | str) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that torch knows, got {value!r}") from error


class _Call(NamedTuple):
    rows: int
    vocab_size: int
    widths: tuple[int, ...]
    item_size: int
    convert: bool
    packing: Packing | None
    train_hidden: bool
    train_weight: bool
    classes: ClassSizes | None = None
    top_k: int = 0

    @property
    def vocabularies(self) -> list[int]:
        """The student's, and the teacher's."""
        own = [self.vocab_size] * len(self.widths)
        if self.classes is not None:
            own[1] = self.classes.teacher_vocabulary
        return own

    @property
    def logit_row(self) -> int:
        """Bytes of both sides' logits."""
        return sum(self.vocabularies) * FP32

    @property
    def weights(self) -> int:
        """Elements of both heads."""
        return sum(v * d for v, d in zip(self.vocabularies, self.widths, strict=True))

    @property
    def gradient_flops(self) -> int:
        one = 2 * self.rows * self.vocab_size * self.widths[0]
        return one * (self.train_hidden + self.train_weight)

    @property
    def projection_flops(self) -> int:
        return 2 * self.rows * self.weights

    @property
    def head_bytes(self) -> int:
        return self.weights * self.item_size

    @property
    def logit_bytes(self) -> int:
        return self.rows * self.vocab_size * FP32

    def projecting(self, rows: int, columns: int) -> int:
        """A block of a head and rows in fp32, or what GEMMs pack instead."""
        if self.packing is not None:
            return self.packing(rows, columns)
        copied = min(BLOCK, columns) + copied_rows(rows, columns)
        return copied * max(self.widths) * FP32 * self.convert

    def accumulating(self, rows: int, columns: int) -> int:
        """The same of the backward pass, of the student's side."""
        if self.packing is not None:
            return self.packing(rows, columns)
        head = min(BLOCK, columns) * self.train_hidden
        some = copied_rows(rows, columns) * self.train_weight
        copied = head + some if copied_rows(rows, columns) == rows else max(head, some)
        return copied * self.widths[0] * FP32 * self.convert

    @property
    def hidden_gradient(self) -> int:
        return self.rows * self.widths[0] * FP32 * self.train_hidden

    @property
    def weight_elements(self) -> int:
        return self.vocab_size * self.widths[0] * self.train_weight


def _retain(call: _Call, chunk: int, tile_rows: int) -> MemoryPlan:
    sides, trains = len(call.widths), call.train_hidden or call.train_weight
    sweeps = -(-call.rows // max(chunk, 1))
    sums = call.weight_elements * FP32
    student_head = call.vocab_size * call.widths[0] * call.item_size
    operands = call.head_bytes + student_head * call.train_hidden + 2 * sums
    workspace = chunk * call.logit_row + tile_rows * TEMPORARIES * max(call.vocabularies) * FP32
    workspace += call.projecting(chunk, call.vocab_size) + chunk * call.top_k * TOP_BYTES
    gradients = call.hidden_gradient + sums
    rounded = call.weight_elements * call.item_size if call.item_size != FP32 else 0
    return MemoryPlan(
        "retain",
        chunk,
        call.vocab_size,
        call.projection_flops + call.gradient_flops,
        sweeps * operands + call.logit_bytes * (3 * sides + 3 * trains),
        workspace,
        gradients,
        gradients + max(workspace, rounded),  # the buffers are gone when gradients are rounded
    )


def _class_sizes(
    verbalizer: Verbalizer | None, vocab_size: int, teacher_width: int | None, temporaries: bool
) -> ClassSizes | None:
    """None where the divergence is over the vocabulary."""
    if verbalizer is None:
        return None
    checks.verbalizer_type(verbalizer)
    if teacher_width is None:
        raise ValueError("teacher_width must be given with a verbalizer")
    if verbalizer.student_size != vocab_size:
        raise ValueError(
            f"verbalizer must be for a vocabulary of {vocab_size}, got {verbalizer.student_size}"
        )
    classes = verbalizer.classes
    return None if classes.prefix else classes.sizes(verbalizer.teacher_size, temporaries)


def _over_classes(call: _Call, problem: Problem, per_row: bool) -> MemoryPlan:
    """Both strategies take whole rows of logits there: *recompute* sweeps two times."""
    assert call.classes is not None
    plan = problem.retain()
    temporaries = plan.tile_rows * problem.both["temporaries"]
    found = _retain(call, even(call.rows, plan.chunk_rows), temporaries)
    own = plan.tile_rows * class_row_bytes(call.vocab_size, call.classes)
    found = found._replace(workspace=found.workspace + own, peak=found.peak + own)
    if not per_row:
        return found
    return found._replace(
        strategy="recompute",
        flops=found.flops + call.projection_flops,
        bytes_moved=found.bytes_moved + call.head_bytes,
    )


class _Stream(NamedTuple):
    block: int
    tile_rows: int  # that need temporaries
    cell: int  # bytes for each row and column of a block
    partials: int  # bytes of the forward pass
    twice: bool  # whether the forward pass goes over the vocabulary two times


def _recompute(call: _Call, stream: _Stream, fused: bool) -> MemoryPlan:
    sides, trains = len(call.widths), call.train_hidden or call.train_weight
    block = min(stream.block, call.vocab_size)
    passes = 1 + stream.twice + trains
    workspace = (stream.cell * call.rows + stream.tile_rows * TEMPORARIES * FP32) * block
    backward = block * call.widths[0] * FP32 * call.train_weight
    backward += call.accumulating(call.rows, block)
    workspace += backward if fused else max(backward, call.projecting(call.rows, block))
    if fused:  # the forward pass has no blocks, and no logits go through memory
        workspace = max(workspace * trains, stream.partials)
        logits = 3 * trains * call.rows * call.vocab_size * stream.cell
    else:
        logits = call.logit_bytes * (2 * sides * passes + 3 * trains)
    gradients = call.hidden_gradient + call.weight_elements * call.item_size
    return MemoryPlan(
        "recompute",
        call.rows,
        block,
        call.projection_flops * passes + call.gradient_flops,
        call.head_bytes * passes + logits,
        workspace,
        gradients,
        gradients + workspace,
    )
