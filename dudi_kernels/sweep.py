"""The two strategies, written once over a backend's primitives.

*retain*: chunks of rows whose logits stay in a reused buffer until their gradient is made, in the
forward call; row coefficients that depend on a whole group of rows (a pair's sequence sums) are
known while the group's logits are still there. *recompute*: vocabulary blocks are streamed, and the
backward pass makes them again from the saved log-sum-exp, writing each block of dW once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dudi_kernels.divergences import Divergence
from dudi_kernels.head import LMHead
from dudi_kernels.plan import Plan


class Side(NamedTuple):
    hidden: Tensor  # (N, D)
    head: LMHead


class Span(NamedTuple):
    """Consecutive rows that are measured by one divergence."""

    start: int
    stop: int
    divergence: Divergence
    share: float | None  # the teacher's, in the mixture


class Needs(NamedTuple):
    """Which gradients are wanted; what is not wanted is never allocated."""

    hidden: bool
    weight: bool
    bias: bool


# (start, stop, log_prob, teacher_log_prob) of a group of rows -> their coefficients, or None
Coefficients = Callable[[int, int, Tensor, "Tensor | None"], "Tensor | None"]


class Task(NamedTuple):
    """What a *retain* sweep computes."""

    student: Side
    teacher: Side | None
    targets: Tensor | None  # (N,)
    weight: Tensor  # (N,) fp32, of the divergence of each row, denominators included
    spans: Sequence[Span]
    groups: Sequence[Sequence[tuple[int, int]]]  # chunks (start, stop) of rows that belong together
    coefficients: Coefficients | None
    teacher_log_prob: bool
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


Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class _Sweep:
    """Buffers and outputs of one *retain* sweep."""

    def __init__(self, task: Task, backend: ModuleType):
        self.task, self.backend = task, backend
        hidden, head = task.student
        self.device, rows = hidden.device, len(hidden)
        largest = max((b - a for group in task.groups for a, b in group), default=0)
        self.logits = self._empty(largest, head.vocab_size)
        sides = [task.student, *([task.teacher] if task.teacher else [])]
        self.teacher_logits = self._empty(largest if task.teacher else 0, head.vocab_size)
        self.values = RowValues(*(torch.zeros(rows, device=self.device) for _ in RowValues._fields))
        self.log_sum = torch.zeros(rows, device=self.device)
        self.masked = any(side.head.bias is not None for side in sides)
        needs = task.needs
        self.grads: Gradients = (
            self._zeros(hidden.shape) if needs.hidden else None,
            self._zeros(head.weight.shape) if needs.weight else None,
            self._zeros((head.vocab_size,)) if needs.bias else None,
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float32, device=self.device)

    def run(self) -> None:
        for group in self.task.groups:
            if len(group) == 1:
                self._project(*group[0])
                self._log_probs(*group[0])
            else:  # longer than a chunk: one extra sweep tells the log-probabilities first
                for chunk in group:
                    self._project(*chunk)
                    self._log_probs(*chunk)
            coefficient = self._coefficient(group[0][0], group[-1][1])
            for start, stop in group:
                if len(group) > 1:
                    self._project(start, stop)
                first = start - group[0][0]
                own = None if coefficient is None else coefficient[first : first + stop - start]
                self._terms(start, stop, own)

    def _project(self, start: int, stop: int) -> None:
        task = self.task
        hidden, head = task.student
        self.backend.project(hidden[start:stop], head, self.logits[: stop - start])
        if task.teacher is not None:
            for a, b in self._taught(start, stop):
                out = self.teacher_logits[a - start : b - start]
                self.backend.project(task.teacher.hidden[a:b], task.teacher.head, out)

    def _taught(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Row ranges in [start, stop) whose teacher logits anything reads."""
        if self.task.teacher_log_prob:
            return [(start, stop)]
        merged: list[tuple[int, int]] = []
        for span in self.task.spans:
            a, b = max(start, span.start), min(stop, span.stop)
            if a < b and merged and merged[-1][1] == a:
                merged[-1] = (merged[-1][0], b)
            elif a < b:
                merged.append((a, b))
        return merged

    def _log_probs(self, start: int, stop: int) -> None:
        rows, tile = slice(start, stop), self.task.plan.tile_rows
        logits = self.logits[: stop - start]
        log_sum = self.backend.log_sum_exp(logits, tile, self.log_sum[rows])
        if self.task.targets is None:
            return
        targets = self.task.targets[rows, None]
        self.values.log_prob[rows] = logits.gather(1, targets)[:, 0] - log_sum
        if self.task.teacher_log_prob:
            logits = self.teacher_logits[: stop - start]
            log_sum = self.backend.log_sum_exp(logits, tile, torch.empty_like(log_sum))
            self.values.teacher_log_prob[rows] = logits.gather(1, targets)[:, 0] - log_sum

    def _coefficient(self, start: int, stop: int) -> Tensor | None:
        if self.task.coefficients is None:
            return None
        rows = slice(start, stop)
        teacher = self.values.teacher_log_prob[rows] if self.task.teacher_log_prob else None
        return self.task.coefficients(start, stop, self.values.log_prob[rows], teacher)

    def _terms(self, start: int, stop: int, coefficient: Tensor | None) -> None:
        """Divergences and entropies of a chunk, its gradient in place, and the two GEMMs."""
        for a, b, span in self._runs(start, stop):
            for i in range(a, b, self.task.plan.tile_rows):
                self._tile(start, i, min(i + self.task.plan.tile_rows, b), span, coefficient)
        needs = self.task.needs
        if not any(needs):
            return
        hidden, head = self.task.student
        grad_hidden, grad_weight, grad_bias = self.grads
        self.backend.accumulate(
            self.logits[: stop - start],
            hidden[start:stop],
            head.weight,
            None if grad_hidden is None else grad_hidden[start:stop],
            grad_weight,
            grad_bias,
        )

    def _runs(self, start: int, stop: int) -> list[tuple[int, int, Span | None]]:
        """[start, stop) cut where the divergence changes."""
        runs: list[tuple[int, int, Span | None]] = []
        position = start
        for span in self.task.spans:
            a, b = max(start, span.start), min(stop, span.stop)
            if a >= b:
                continue
            if position < a:
                runs.append((position, a, None))
            runs.append((a, b, span))
            position = b
        if position < stop:
            runs.append((position, stop, None))
        return runs

    def _tile(
        self, start: int, a: int, b: int, span: Span | None, coefficient: Tensor | None
    ) -> None:
        task, local = self.task, slice(a - start, b - start)
        taught = span is not None and task.teacher is not None
        terms = self.backend.row_terms(
            self.logits[local],
            self.log_sum[a:b],
            self.teacher_logits[local] if taught else None,
            span.divergence if span else None,
            span.share if span else None,
            task.inv_tau,
            task.weight[a:b],
            None if coefficient is None else coefficient[local],
            None if task.targets is None else task.targets[a:b],
            task.student.head if any(task.needs) else None,
            self.masked,
        )
        self.values.divergence[a:b] = terms.divergence
        self.values.entropy[a:b] = terms.entropy
        self.values.teacher_entropy[a:b] = terms.teacher_entropy


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
        combine: Callable[[RowValues], Tensor],
    ) -> tuple[Tensor, ...]:
        sweep = _Sweep(task, backend)
        sweep.run()
        ctx.grads = sweep.grads
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.mark_non_differentiable(*sweep.values)
        ctx.set_materialize_grads(False)
        return combine(sweep.values), *sweep.values

    @staticmethod
    @once_differentiable
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
            None if g is None else g.mul_(grad).to(dtype)
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
        head: LMHead,
        targets: Tensor,  # (N,)
        inv_tau: float,
        block: int,
        backend: ModuleType,
    ) -> Tensor:
        rows = len(hidden)
        fp32 = {"dtype": torch.float32, "device": hidden.device}
        log_sum = torch.full((rows,), -torch.inf, **fp32)
        target = torch.zeros(rows, **fp32)
        buffer = torch.empty(rows * min(block, head.vocab_size), **fp32)
        for start in range(0, head.vocab_size, block):
            part = block_of(head, start, block)
            scaled = backend.project(hidden, part, _view(buffer, rows, part)).mul_(inv_tau)
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(scaled, 1))
            inside, local = _inside(targets, start, part.vocab_size)
            target = torch.where(inside, scaled.gather(1, local)[:, 0], target)
        ctx.save_for_backward(hidden, targets, log_sum)
        ctx.head, ctx.inv_tau, ctx.block, ctx.backend = head, inv_tau, block, backend
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return target - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, targets, log_sum = ctx.saved_tensors
        head, block, backend = ctx.head, ctx.block, ctx.backend
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        fp32 = {"dtype": torch.float32, "device": hidden.device}
        rows = len(hidden)
        grad = grad.float()[:, None]
        grad_hidden = torch.zeros(hidden.shape, **fp32) if need_hidden else None
        grad_weight = torch.empty_like(head.weight) if need_weight else None
        grad_bias = torch.empty_like(head.bias) if need_bias else None
        buffer = torch.empty(rows * min(block, head.vocab_size), **fp32)
        for start in range(0, head.vocab_size, block):
            part = block_of(head, start, block)
            stop = start + part.vocab_size
            logits = backend.project(hidden, part, _view(buffer, rows, part))
            scaled = logits.mul(ctx.inv_tau)
            ds = scaled.sub_(log_sum[:, None]).exp_().mul_(-grad)
            inside, local = _inside(targets, start, part.vocab_size)
            ds.scatter_add_(1, local, grad * inside[:, None])
            ds.mul_(ctx.inv_tau)
            backend.through_shape(ds, logits, head)
            own = [None if g is None else g[start:stop] for g in (grad_weight, grad_bias)]
            backend.write_block(ds, hidden, part.weight, grad_hidden, *own)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.dtypes[0])
        return (grad_hidden, grad_weight, grad_bias, *(None,) * 5)


def block_of(head: LMHead, start: int, block: int) -> LMHead:
    """Rows [start, start + block) of a head."""
    bias = None if head.bias is None else head.bias.detach()[start : start + block]
    return LMHead(head.weight.detach()[start : start + block], bias, head.softcap, head.scale)


def _view(buffer: Tensor, rows: int, part: LMHead) -> Tensor:
    return buffer[: rows * part.vocab_size].view(rows, part.vocab_size)


def _inside(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block, and (N, 1) safe local indices."""
    local = targets - start
    inside = (local >= 0) & (local < width)
    return inside, local.clamp(0, width - 1)[:, None]
