"""The two strategies, written once over a backend's primitives.

*retain*: chunks of rows whose logits stay in a reused buffer until their gradient is made, in the
forward call; coefficients that depend on a whole group of rows (a pair's sequence sums) are known
while the group's logits are still there. *recompute*: vocabulary blocks are streamed, and the
backward pass makes them again from the saved log-sum-exp, writing each block of dW once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi_kernels.divergences import Measure
from dudi_kernels.head import LMHead
from dudi_kernels.plan import Plan

Chunk = tuple[int, int]  # rows [start, stop)


class Side(NamedTuple):
    """One model's rows and head, detached."""

    hidden: Tensor  # (N, D)
    head: LMHead


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
    plan: Plan
    needs: Needs


class RowValues(NamedTuple):
    """Per row, fp32, detached."""

    divergence: Tensor
    log_prob: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    teacher_log_prob: Tensor


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def chunks(start: int, stop: int, size: int) -> list[Chunk]:
    """[start, stop) in steps of `size`."""
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


class _Sweep:
    """Buffers and results of one *retain* sweep."""

    def __init__(self, task: Task, backend: ModuleType):
        self.task, self.backend = task, backend
        hidden, head = task.student
        rows = len(hidden)
        largest = max((b - a for group in task.groups for a, b in group), default=0)
        zeros = partial(torch.zeros, dtype=torch.float32, device=hidden.device)
        shape = (largest, head.vocab_size)
        self.log_q = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        self.log_p = torch.empty_like(self.log_q) if task.teacher is not None else self.log_q[:0]
        self.values = RowValues(*(zeros(rows) for _ in RowValues._fields))
        self.log_sum = zeros(rows) if head.softcap is not None else None
        heads = [side.head for side in (task.student, task.teacher) if side is not None]
        self.masked = any(h.bias is not None for h in heads)  # where -inf comes from
        self.grads = Gradients(
            zeros(hidden.shape) if task.needs.hidden else None,
            zeros(head.weight.shape) if task.needs.weight else None,
            zeros(head.vocab_size) if task.needs.bias else None,
        )

    def run(self) -> None:
        for group in self.task.groups:
            if self.task.coefficients is None:
                for chunk in group:
                    self._chunk(*chunk, self._known(*chunk))
            elif len(group) == 1:
                self._short_group(*group[0])
            else:
                self._long_group(group)

    def _chunk(self, start: int, stop: int, coefficient: Tensor | None) -> None:
        """Everything about a chunk, one tile after the other while it is in cache."""
        self._project(start, stop)
        for a, b, measure in self._tiles(start, stop):
            self._normalize(start, a, b, self._reads_teacher(measure))
            self._terms(start, a, b, measure, coefficient)
        self._accumulate(start, stop)

    def _short_group(self, start: int, stop: int) -> None:
        """Its logits stay until its coefficients are known."""
        self._project(start, stop)
        tiles = self._tiles(start, stop)
        for a, b, measure in tiles:
            self._normalize(start, a, b, self._reads_teacher(measure))
        coefficient = self._coefficient(start, stop)
        for a, b, measure in tiles:
            self._terms(start, a, b, measure, coefficient)
        self._accumulate(start, stop)

    def _long_group(self, group: Sequence[Chunk]) -> None:
        """An extra sweep tells the log-probabilities first."""
        for start, stop in group:
            self._project(start, stop, teacher=self.task.teacher_log_prob)
            for a, b, _ in self._tiles(start, stop):
                self._normalize(start, a, b, self.task.teacher_log_prob)
        first, last = group[0][0], group[-1][1]
        coefficient = self._coefficient(first, last)
        for start, stop in group:
            self._chunk(start, stop, coefficient[start - first : stop - first])

    def _known(self, start: int, stop: int) -> Tensor | None:
        return None if self.task.coefficient is None else self.task.coefficient[start:stop]

    def _coefficient(self, start: int, stop: int) -> Tensor:
        assert self.task.coefficients is not None
        rows = slice(start, stop)
        teacher = self.values.teacher_log_prob[rows] if self.task.teacher_log_prob else None
        own = self.task.coefficients(start, stop, self.values.log_prob[rows], teacher)
        known = self._known(start, stop)
        return own if known is None else own + known

    def _tiles(self, start: int, stop: int) -> list[tuple[int, int, Measure | None]]:
        """[start, stop) in tiles of one divergence each."""
        runs: list[tuple[int, int, Measure | None]] = []
        position = start
        for span in self.task.spans:
            a, b = max(start, span.start), min(stop, span.stop)
            if a < b:
                runs += [(position, a, None), (a, b, span.measure)]
                position = b
        runs.append((position, stop, None))
        size = self.task.plan.tile_rows
        return [(i, j, measure) for a, b, measure in runs for i, j in chunks(a, b, size)]

    def _reads_teacher(self, measure: Measure | None) -> bool:
        return measure is not None or self.task.teacher_log_prob

    def _taught(self, start: int, stop: int) -> list[Chunk]:
        """Row ranges whose teacher logits anything reads."""
        if self.task.teacher is None or self.task.teacher_log_prob:
            return [(start, stop)] if self.task.teacher else []
        merged: list[Chunk] = []
        for span in self.task.spans:
            a, b = max(start, span.start), min(stop, span.stop)
            if a >= b:
                continue
            if merged and merged[-1][1] == a:
                a = merged.pop()[0]
            merged.append((a, b))
        return merged

    def _project(self, start: int, stop: int, teacher: bool = True) -> None:
        hidden, head = self.task.student
        self.backend.project(hidden[start:stop], head, self.log_q[: stop - start])
        if teacher and self.task.teacher is not None:
            hidden, head = self.task.teacher
            for a, b in self._taught(start, stop):
                self.backend.project(hidden[a:b], head, self.log_p[a - start : b - start])

    def _normalize(self, start: int, a: int, b: int, teacher: bool) -> None:
        task, local = self.task, slice(a - start, b - start)
        targets = None if task.targets is None else task.targets[a:b]
        log_sum = None if self.log_sum is None else self.log_sum[a:b]
        self.backend.normalize(self.log_q[local], targets, self.values.log_prob[a:b], log_sum)
        if teacher and task.teacher is not None:
            own = targets if task.teacher_log_prob else None
            log_prob = self.values.teacher_log_prob[a:b]
            self.backend.normalize(self.log_p[local], own, log_prob, None)

    def _terms(
        self, start: int, a: int, b: int, measure: Measure | None, coefficient: Tensor | None
    ) -> None:
        task, local = self.task, slice(a - start, b - start)
        terms = self.backend.row_terms(
            self.log_q[local],
            self.log_p[local] if measure is not None else None,
            measure,
            task.inv_tau,
            task.weight[a:b],
            None if coefficient is None else coefficient[local],
            None if task.targets is None else task.targets[a:b],
            None if self.log_sum is None else self.log_sum[a:b],
            task.student.head if any(task.needs) else None,
            self.masked,
        )
        self.values.divergence[a:b] = terms.divergence
        self.values.entropy[a:b] = terms.entropy
        self.values.teacher_entropy[a:b] = terms.teacher_entropy

    def _accumulate(self, start: int, stop: int) -> None:
        if not any(self.task.needs):
            return
        hidden, head = self.task.student
        rows, grads = slice(start, stop), self.grads
        self.backend.accumulate(
            self.log_q[: stop - start],
            hidden[rows],
            head.weight,
            None if grads.hidden is None else grads.hidden[rows],
            grads.weight,
            grads.bias,
        )


def _no_autocast(device: torch.device) -> torch.autocast:
    """fp32 stays fp32 in here."""
    return torch.autocast(device.type, enabled=False)


class _Undifferentiable(torch.autograd.Function):
    """A gradient that says so when someone asks for its own gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("fused losses have no second derivative: double backward through one")


def _first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """As torch's `once_differentiable`, which lets constants of a double backward pass silently."""

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        anchor = torch.zeros((), requires_grad=True)
        return tuple(None if r is None else _Undifferentiable.apply(r, anchor) for r in results)

    return wrapper


class Retain(torch.autograd.Function):
    """A scalar whose gradients are made in the forward call and handed over once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task: Task,
        backend: ModuleType,
        combine: Callable[[RowValues], Tensor],  # the loss
    ) -> tuple[Tensor, ...]:
        sweep = _Sweep(task, backend)
        with _no_autocast(hidden.device):
            sweep.run()
            loss = combine(sweep.values)
        ctx.grads = sweep.grads
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*sweep.values)
        ctx.set_materialize_grads(False)
        return loss, *sweep.values

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        if ctx.grads is None:
            raise RuntimeError(
                "backward through a fused loss a second time: its gradients were made in the "
                "forward call and handed over; call the loss again"
            )
        grads, ctx.grads = ctx.grads, None
        scaled = [
            None if g is None else g.mul_(grad).to(dtype)  # in fp32 first: a GradScaler's factor
            for g, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


class LogProb(torch.autograd.Function):
    """log q[target] of each row, differentiable by row (*recompute*)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,
        bias: Tensor | None,
        side: Side,  # the same, detached, as the GEMMs take it
        targets: Tensor,  # (N,)
        inv_tau: float,
        block: int,
        backend: ModuleType,
    ) -> Tensor:
        rows = len(hidden)
        log_sum = torch.full((rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        target = torch.zeros_like(log_sum)
        buffer = log_sum.new_empty(rows * min(block, side.head.vocab_size))
        with _no_autocast(hidden.device):
            for start, stop in chunks(0, side.head.vocab_size, block):
                part = _part(side.head, start, stop)
                logits = backend.project(side.hidden, part, _view(buffer, rows, part))
                backend.stream_block(logits, inv_tau, targets - start, log_sum, target)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum)
        ctx.shape = side.hidden.dtype, side.head.softcap, side.head.scale
        ctx.inv_tau, ctx.block, ctx.backend = inv_tau, block, backend
        return target - log_sum

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, log_sum = ctx.saved_tensors
        dtype, softcap, scale = ctx.shape
        side = Side(hidden.to(dtype), LMHead(weight, bias, softcap, scale))
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        zeros = partial(torch.zeros, dtype=torch.float32, device=hidden.device)
        grad_hidden = zeros(hidden.shape) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        rows, width = hidden.shape
        buffer = log_sum.new_empty(rows * min(ctx.block, len(weight)))
        with _no_autocast(hidden.device):
            for start, stop in chunks(0, len(weight), ctx.block):
                part = _part(side.head, start, stop)
                logits = ctx.backend.project(side.hidden, part, _view(buffer, rows, part))
                ctx.backend.block_gradient(
                    logits, ctx.inv_tau, targets - start, log_sum, grad.float(), part
                )
                own_weight = zeros(stop - start, width) if need_weight else None
                own_bias = zeros(stop - start) if need_bias else None
                ctx.backend.accumulate(
                    logits, side.hidden, part.weight, grad_hidden, own_weight, own_bias
                )
                for whole, own in ((grad_weight, own_weight), (grad_bias, own_bias)):
                    if whole is not None and own is not None:
                        whole[start:stop] = own
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return (grad_hidden, grad_weight, grad_bias, *(None,) * 5)


def _part(head: LMHead, start: int, stop: int) -> LMHead:
    """Rows [start, stop) of a head."""
    bias = None if head.bias is None else head.bias[start:stop]
    return LMHead(head.weight[start:stop], bias, head.softcap, head.scale)


def _view(buffer: Tensor, rows: int, part: LMHead) -> Tensor:
    return buffer[: rows * part.vocab_size].view(rows, part.vocab_size)
