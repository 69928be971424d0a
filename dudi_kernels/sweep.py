"""*retain*: a scalar loss whose gradients are made in the forward call.

Chunks of rows are projected into reused buffers, where their logits stay until their gradient is
made; coefficients that depend on a whole group of rows (a pair's sequence sums) are known while the
group's logits are still there. Written once over a backend's primitives (tiles.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi_kernels.autograd import first_order, no_autocast
from dudi_kernels.classes import Classes
from dudi_kernels.divergences import Measure
from dudi_kernels.head import LMHead
from dudi_kernels.nucleus import restrict
from dudi_kernels.plan import Plan
from dudi_kernels.skipping import Tally, live_columns
from dudi_kernels.tiles import RowState, Setting, Steps, Tile, infinite_mask
from dudi_kernels.topk import Top
from dudi_kernels.topk_steps import TopKSteps
from dudi_kernels.verbalized import Verbalized

TILE_ROWS = 32  # that a GEMM takes at once

Chunk = tuple[int, int]  # rows [start, stop)


class Side(NamedTuple):
    """One model's rows and head, detached."""

    hidden: Tensor  # (N, D)
    head: LMHead
    low: Tensor | None  # (N, r) fp32 where the head has a LoRA

    def rows(self, start: int, stop: int) -> Side:
        low = None if self.low is None else self.low[start:stop]
        return Side(self.hidden[start:stop], self.head, low)

    def pick(self, index: Tensor) -> Side:
        low = None if self.low is None else self.low.index_select(0, index)
        return Side(self.hidden.index_select(0, index), self.head, low)

    def part(self, start: int, stop: int) -> Side:
        """Rows [start, stop) of the vocabulary."""
        return self._replace(head=self.head.part(start, stop))


class Span(NamedTuple):
    """Consecutive rows that are measured by one divergence."""

    start: int
    stop: int
    measure: Measure


class Needs(NamedTuple):
    """Which gradients are wanted; what is not wanted is never allocated."""

    hidden: bool
    weight: bool
    bias: bool
    low: bool
    lora_b: bool


# (start, stop, log_prob, teacher_log_prob) of a group of rows -> (R,) d loss / d log_prob
Coefficients = Callable[[int, int, Tensor, "Tensor | None"], Tensor]


class Task(NamedTuple):
    """What a *retain* sweep computes."""

    student: Side
    teacher: Side | None
    targets: Tensor | None  # (N,)
    weight: Tensor  # (N,) fp32, of the divergence of each row, denominators included
    spans: Sequence[Span]  # in order; rows outside of them have no divergence
    groups: Sequence[Sequence[Chunk]]  # chunks of rows whose coefficients belong together
    coefficient: Tensor | None  # (N,) d loss / d log_prob, what of it is known beforehand
    coefficients: Coefficients | None  # the rest of it, by group
    teacher_log_prob: bool  # whether `coefficients` needs it
    inv_tau: float
    teacher_inv_tau: float
    plan: Plan
    needs: Needs
    tolerance: float = 0.0  # of skipping.py; 0: exact
    classes: Classes | None = None  # that the divergences are over; None: the vocabulary
    teacher_top_p: float = 1.0  # of nucleus.py; 1: the whole vocabulary
    top: Top | None = None  # what is known of the teacher, in place of its side


class RowValues(NamedTuple):
    """Per row, fp32, detached."""

    divergence: Tensor
    log_prob: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    teacher_log_prob: Tensor


class Gradients(NamedTuple):
    """fp32 sums."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low: Tensor | None
    lora_b: Tensor | None

    def rows(self, start: int, stop: int) -> Gradients:
        """Those of some rows, and the whole of the head's."""
        hidden, low = (None if g is None else g[start:stop] for g in (self.hidden, self.low))
        return self._replace(hidden=hidden, low=low)

    def part(self, start: int, stop: int) -> Gradients:
        """Those of rows [start, stop) of the vocabulary, and the whole of the hidden states'."""
        weight, bias, b = (
            None if g is None else g[start:stop] for g in (self.weight, self.bias, self.lora_b)
        )
        return self._replace(weight=weight, bias=bias, lora_b=b)


def new_gradients(side: Side, needs: Needs) -> Gradients:
    """Zeros; of the weight, which is large, memory that the first `accumulate` fills."""
    found: list[Tensor | None] = []
    for name, tensor, needed in zip(Needs._fields, inputs_of(side), needs, strict=True):
        if not needed or tensor is None:
            found.append(None)
            continue
        new = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        found.append(new if name == "weight" else new.zero_())
    return Gradients(*found)


def inputs_of(side: Side) -> tuple[Tensor | None, ...]:
    """In the order of `Needs`."""
    b = None if side.head.lora is None else side.head.lora.b
    return side.hidden, side.head.weight, side.head.bias, side.low, b


def chunks(start: int, stop: int, size: int) -> list[Chunk]:
    """[start, stop) in steps of `size`."""
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


def even(rows: int, size: int) -> int:
    """A step of at most `size` that leaves no short rest; whole tiles where that costs no step."""
    step = max(1, -(-rows // max(1, -(-rows // size))))
    tiled = -(-step // TILE_ROWS) * TILE_ROWS
    return tiled if step < rows and tiled <= size else step


def runs(spans: Sequence[Span], start: int, stop: int) -> list[tuple[int, int, Measure | None]]:
    """[start, stop) in runs of one divergence each, or of none."""
    found: list[tuple[int, int, Measure | None]] = []
    position = start
    for span in spans:
        a, b = max(start, span.start), min(stop, span.stop)
        if a < b:
            found += [(position, a, None), (a, b, span.measure)]
            position = b
    found.append((position, stop, None))
    return [run for run in found if run[0] < run[1]]


class Sweep:
    """Buffers, state and results of one *retain* sweep."""

    def __init__(self, task: Task, backend: ModuleType):
        self.task, self.backend = task, backend
        hidden, head = task.student.hidden, task.student.head
        largest = max((b - a for group in task.groups for a, b in group), default=0)
        new = partial(torch.empty, dtype=torch.float32, device=hidden.device)
        other = None if task.teacher is None else task.teacher.head
        self.student = new(largest, head.vocab_size)
        self.teacher = None if other is None else new(largest, other.vocab_size)
        self.state = RowState.fresh(task.weight)
        self.state.coefficient = self._known_coefficients()
        if any(span.measure.adaptive for span in task.spans):
            self.state.mixture = torch.zeros_like(self.state.weight)
        inv_taus = (task.inv_tau, task.teacher_inv_tau)
        self.setting = Setting.of(head, other, task.targets, inv_taus, task.plan.tile_rows)
        if task.teacher_top_p < 1:
            self.setting = self.setting._replace(masked=True)
        self.grads = new_gradients(task.student, task.needs)
        self.by_class: Verbalized | TopKSteps | None = None  # steps of rows with a divergence
        if task.classes is not None and other is not None:
            self.by_class = Verbalized(
                task.classes, backend, self.setting, self.state, other.vocab_size
            )
        elif task.top is not None:
            self.by_class = TopKSteps(task.top, backend, self.setting, self.state)
        self.mixes = True  # whether a backend makes the mixture of an adaptive divergence
        self.filled = False  # whether the weight's gradient has been written to
        self.tally = Tally(hidden.device)

    def _known_coefficients(self) -> Tensor | None:
        task = self.task
        if task.coefficients is None:
            return task.coefficient
        return torch.zeros_like(task.weight) if task.coefficient is None else task.coefficient

    def run(self) -> RowValues:
        for group in self.task.groups:
            if self.task.coefficients is None:
                for chunk in group:
                    self._project(*chunk)
                    self._gradient(*chunk, statistics=True, sums=True)
            elif len(group) == 1:
                self._short_group(*group[0])
            else:
                self._long_group(group)
        return self._values()

    def _short_group(self, start: int, stop: int) -> None:
        """Its logits stay until its coefficients are known."""
        self._project(start, stop)
        self._steps(start, stop, statistics=True, sums=True)
        self._set_coefficients(start, stop)
        self._gradient(start, stop)

    def _long_group(self, group: Sequence[Chunk]) -> None:
        """An extra sweep tells the log-probabilities first; of the teacher's only if needed."""
        early = self.task.teacher_log_prob
        for chunk in group:
            self._project(*chunk, teacher=early)
            self._steps(*chunk, statistics=True, teacher=early)
        self._set_coefficients(group[0][0], group[-1][1])
        for chunk in group:
            self._project(*chunk)
            self._gradient(*chunk, late_teacher=not early, sums=True)

    def _set_coefficients(self, start: int, stop: int) -> None:
        """What the sums of a group of rows add to their coefficients."""
        assert self.task.coefficients is not None and self.state.coefficient is not None
        rows = slice(start, stop)
        teacher = self.state.teacher_log_prob[rows] if self.task.teacher_log_prob else None
        own = self.task.coefficients(start, stop, self.state.log_prob[rows], teacher)
        self.state.coefficient[rows] += own

    # ---- row ranges ------------------------------------------------------------------------------

    def _taught(self, start: int, stop: int) -> list[Chunk]:
        """Row ranges whose teacher logits anything reads."""
        if self.task.teacher is None or self.task.teacher_log_prob:
            return [(start, stop)] if self.task.teacher else []
        merged: list[Chunk] = []
        for a, b, measure in runs(self.task.spans, start, stop):
            if measure is None:
                continue
            if merged and merged[-1][1] == a:
                a = merged.pop()[0]
            merged.append((a, b))
        return merged

    # ---- steps -----------------------------------------------------------------------------------

    def _project(self, start: int, stop: int, teacher: bool = True) -> None:
        """Logits of a chunk; of the teacher only where they are read."""
        side = self.task.student.rows(start, stop)
        self.backend.project(side, self.student[: stop - start])
        if self.task.teacher is None or not teacher:
            return
        assert self.teacher is not None
        for a, b in self._taught(start, stop):
            logits = self.teacher[a - start : b - start]
            self.backend.project(self.task.teacher.rows(a, b), logits)
            if (top_p := self.task.teacher_top_p) < 1:
                restrict(logits, self.task.teacher_inv_tau, top_p, self.task.plan.tile_rows)

    def _steps(
        self,
        start: int,
        stop: int,
        *,
        statistics: bool = False,  # the student's, and the teacher's where they are read
        teacher: bool = True,
        late_teacher: bool = False,  # the teacher's alone
        sums: bool = False,
        gradient: bool = False,
        columns: tuple[int, int] | None = None,  # of the gradient; None: all
    ) -> None:
        first, last = columns or (0, self.setting.vocabulary)
        for a, b, measure in runs(self.task.spans, start, stop):
            local = slice(a - start, b - start)
            other = None  # of the teacher's vocabulary, which has columns of its own with classes
            if self.teacher is not None and (measure is not None or self.by_class is None):
                other = self.teacher[local, slice(first, last) if columns else slice(None)]
            read = measure is not None or self.task.teacher_log_prob
            wanted = Steps(
                statistics=statistics,
                teacher_statistics=read and (late_teacher or (statistics and teacher)),
                mixture=sums and self.mixes and measure is not None and measure.adaptive,
                sums=sums,
                gradient=gradient,
            )
            tile = Tile(self.student[local, first:last], other, a, first, measure)
            if self.by_class is None or measure is None:
                self.backend.steps(self.setting, self.state, tile, wanted)
            else:
                self.by_class.steps(tile, wanted)

    def _gradient(self, start: int, stop: int, **earlier: Any) -> None:
        """The gradient of a chunk and what is made of it, after or together with earlier steps."""
        if not any(self.task.needs):
            self._steps(start, stop, **earlier)
        elif self.task.tolerance == 0:
            self._steps(start, stop, gradient=True, **earlier)
            side, grads = self.task.student.rows(start, stop), self.grads.rows(start, stop)
            self.backend.accumulate(self.student[: stop - start], side, grads, self.filled)
            self.filled = True
        else:
            self._steps(start, stop, **earlier)
            self._live_gradient(start, stop)

    def _live_gradient(self, start: int, stop: int) -> None:
        """Only the columns that the tolerance does not leave out."""
        if self.grads.weight is not None and not self.filled:
            self.grads.weight.zero_()
        self.filled = True
        side, grads = self.task.student.rows(start, stop), self.grads.rows(start, stop)
        for columns in self._live(start, stop):
            self._steps(start, stop, gradient=True, columns=columns)
            grad = self.student[: stop - start, slice(*columns)]
            self.backend.accumulate(grad, side.part(*columns), grads.part(*columns), True)

    def _live(self, start: int, stop: int) -> list[Chunk]:
        tiles = []
        for a, b, measure in runs(self.task.spans, start, stop):
            for first, last in chunks(a, b, self.setting.tile_rows):
                local = slice(first - start, last - start)
                teacher = None if self.teacher is None else self.teacher[local]
                tiles.append(Tile(self.student[local], teacher, first, 0, measure))
        return live_columns(self.setting, self.state, tiles, self.task.tolerance, self.tally)

    def _values(self) -> RowValues:
        state = self.state
        if self.grads.weight is not None and not self.filled:  # no rows
            self.grads.weight.zero_()
        if self.setting.masked or (self.by_class is not None and self.by_class.masked):
            for start, stop, measure in self.task.spans:
                poles = state.poles[start:stop] & infinite_mask(measure)
                state.divergence[start:stop].masked_fill_(poles != 0, torch.inf)
        return RowValues(
            state.divergence,
            state.log_prob,
            state.entropy,
            state.teacher_entropy,
            state.teacher_log_prob,
        )


class Retain(torch.autograd.Function):
    """A scalar whose gradients are made in the forward call and handed over once."""

    @staticmethod
    def forward(
        ctx: Any,
        sweep: Sweep,
        combine: Callable[[RowValues], Tensor],  # the loss
        *inputs: Tensor | None,  # in the order of Needs
    ) -> tuple[Tensor, ...]:
        with no_autocast(sweep.task.weight.device):
            values = sweep.run()
            loss = combine(values)
        ctx.grads = sweep.grads
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return loss, *values

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * (2 + len(ctx.dtypes))
        if ctx.grads is None:
            raise RuntimeError(
                "backward through a fused loss a second time: its gradients were made in the "
                "forward call and handed over; call the loss again"
            )
        grads, ctx.grads = ctx.grads, None
        one = grad.device.type == "cpu" and float(grad) == 1  # a pass over dW saved
        scaled = [
            # in fp32 first: a GradScaler's factor
            None if g is None else (g if one else g.mul_(grad)).to(dtype)
            for g, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (None, None, *scaled)
