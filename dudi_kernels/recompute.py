"""*recompute*: per-row values, all differentiable together, from vocabulary blocks.

The forward pass streams blocks of columns for all rows and keeps their statistics; the backward
pass makes the blocks again and writes each block of dW once, in its own dtype. Entropy and the two
KLs add up over blocks by the chain rule, so they need one forward pass; other divergences need the
log-sum-exps of whole rows first, and take two. An adaptive one needs whole rows of logits: its
forward pass is one over chunks of rows. Ranks that have a slice of the vocabulary each meet on the
way (distributed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi_kernels.autograd import first_order, no_autocast
from dudi_kernels.chain import put_together, settle, widened
from dudi_kernels.classes import Classes
from dudi_kernels.distributed import Meeting, new_sweep
from dudi_kernels.divergences import Measure
from dudi_kernels.plan import Plan
from dudi_kernels.skipping import Blocks, Tally, choose, runs_of
from dudi_kernels.sweep import (
    Chunk,
    Gradients,
    Needs,
    RowValues,
    Side,
    Span,
    Sweep,
    Task,
    chunks,
    even,
    inputs_of,
    new_gradients,
)
from dudi_kernels.tiles import RowState, Setting, Steps, Tile, infinite_mask


class Live(NamedTuple):
    """Which tiles of the gradient of the logits are not left out."""

    tiles: Tensor  # (blocks of rows, blocks of columns) bool
    rows: int  # of a block
    columns: int


class Job(NamedTuple):
    """What a *recompute* pass computes."""

    student: Side
    teacher: Side | None
    targets: Tensor | None  # (N,)
    measure: Measure | None
    entropy: bool  # whether it is wanted where there is no divergence
    inv_tau: float
    teacher_inv_tau: float
    block: int  # columns
    tile_rows: int
    row_plan: Plan | None  # of a forward pass over rows, where the divergence needs one
    backend: ModuleType
    live: Live | None = None  # tiles of the gradient; None: all
    classes: Classes | None = None  # that the divergence is over: both passes are over rows then


def nothing() -> None:
    """Between the passes of one process."""


class Stream:
    """The blocks of a job, through one buffer for each side and a backend's primitives."""

    def __init__(self, job: Job):
        self.job = job
        head, rows = job.student.head, len(job.student.hidden)
        size = rows * min(job.block, head.vocab_size)
        new = partial(torch.empty, dtype=torch.float32, device=job.student.hidden.device)
        self.buffers = new(size), new(size if job.teacher is not None else 0)
        other = None if job.teacher is None else job.teacher.head
        inv_taus = (job.inv_tau, job.teacher_inv_tau)
        self.setting = Setting.of(head, other, job.targets, inv_taus, job.tile_rows)

    def blocks(self, columns: list[Chunk] | None = None) -> Iterator[tuple[Tile, Side]]:
        """Tiles of fresh logits, and the student's side of those columns; by default of all."""
        job = self.job
        for start, stop in columns or chunks(0, job.student.head.vocab_size, job.block):
            sides = [
                None if side is None else self._logits(side, buffer, start, stop)
                for side, buffer in zip((job.student, job.teacher), self.buffers, strict=True)
            ]
            student, teacher = sides
            assert student is not None
            yield Tile(student, teacher, 0, start, job.measure), job.student.part(start, stop)

    def _logits(self, side: Side, buffer: Tensor, start: int, stop: int) -> Tensor:
        rows = len(side.hidden)
        out = buffer[: rows * (stop - start)].view(rows, stop - start)
        return self.job.backend.project(side.part(start, stop), out)

    def steps(self, state: RowState, tile: Tile, wanted: Steps) -> None:
        self.job.backend.steps(self.setting, state, tile, wanted)

    def forward(self, state: RowState, between: Callable[[], None] = nothing) -> None:
        """Statistics of all rows, and the sums that are wanted; `between` the two where they are
        two passes."""
        job, taught = self.job, self.job.teacher is not None
        if job.measure is None and not job.entropy:
            for tile, _ in self.blocks():
                self.steps(state, tile, Steps(True, taught))
        elif job.measure is None or job.measure.chain is not None:
            _one_pass(self, state)
        else:
            for tile, _ in self.blocks():
                self.steps(state, tile, Steps(True, taught))
            between()
            for tile, _ in self.blocks():
                self.steps(state, tile, Steps(sums=True))

    def gradients(
        self, state: RowState, columns: list[Chunk]
    ) -> Iterator[tuple[Tensor, Side, int]]:
        """The gradient of the logits by these blocks, the student's side, the first column."""
        for tile, side in self.blocks(columns):
            self.steps(state, tile, Steps(gradient=True))
            yield tile.student, side, tile.first_column


def _forward(job: Job) -> RowState:
    """The state of all rows."""
    rows = job.student.hidden
    if job.row_plan is not None:
        nothing = Needs(*[False] * len(Needs._fields))
        sweep = _row_sweep(job, torch.zeros(len(rows), device=rows.device), None, nothing)
        sweep.run()
        return sweep.state
    state = RowState.fresh(torch.zeros(len(rows), device=rows.device))
    stream, shard = job.backend.Stream(job), job.student.head.shard
    if shard is None:
        stream.forward(state)
    else:
        _forward_of_ranks(job, stream, state, Meeting(shard, state))
    _set_infinite(job, state)
    return state


def _forward_of_ranks(job: Job, stream: Any, state: RowState, meeting: Meeting) -> None:
    """The state of whole rows, from what each rank has of them."""
    rows, taught = len(state.weight), job.teacher is not None
    statistics = partial(meeting.statistics, 0, rows, student=True, teacher=taught)
    stream.forward(state, statistics)
    if job.measure is None and not job.entropy:
        statistics()
    elif job.measure is None or job.measure.chain is not None:
        meeting.chained([(0, rows, job.measure)])
    else:
        meeting.sums(0, rows)


def _set_infinite(job: Job, state: RowState) -> None:
    if job.measure is not None:
        infinite = (state.poles & infinite_mask(job.measure)) != 0
        state.divergence.masked_fill_(infinite, torch.inf)


def _row_sweep(job: Job, weight: Tensor, coefficient: Tensor | None, needs: Needs) -> Sweep:
    """A *retain* sweep over the job's rows."""
    assert job.row_plan is not None
    rows = len(job.student.hidden)
    task = Task(
        student=job.student,
        teacher=job.teacher,
        targets=job.targets,
        weight=weight,
        spans=[] if job.measure is None else [Span(0, rows, job.measure)],
        groups=[[chunk] for chunk in chunks(0, rows, even(rows, job.row_plan.chunk_rows))],
        coefficient=coefficient,
        coefficients=None,
        teacher_log_prob=False,
        inv_tau=job.inv_tau,
        teacher_inv_tau=job.teacher_inv_tau,
        plan=job.row_plan,
        needs=needs,
        classes=job.classes,
    )
    return new_sweep(task, job.backend)


# ---- one pass by the chain rule ------------------------------------------------------------------


def _one_pass(blocks: Stream, state: RowState) -> None:
    """Statistics and sums of each block by itself, put together with those of earlier columns."""
    job, targets, whole = blocks.job, blocks.setting.targets, widened(state)
    for tile, _ in blocks.blocks():
        own = RowState.fresh(state.weight)
        blocks.steps(own, tile, Steps(True, job.teacher is not None, sums=True))
        if targets is not None:
            inside = _inside(targets, tile)
            for name in ("target", "teacher_target"):
                older, local = getattr(state, name), getattr(own, name)
                older.copy_(torch.where(inside, local, older))
        put_together(whole, own, job.measure)
    settle(state, whole, job.measure)


def _inside(targets: Tensor, tile: Tile) -> Tensor:
    local = targets - tile.first_column
    return (local >= 0) & (local < tile.student.shape[1])


# ---- autograd ------------------------------------------------------------------------------------


class RowWise(torch.autograd.Function):
    """(divergence, log_prob, entropy, teacher_entropy) of each row; the last is not differentiable.

    Without a teacher or targets the values that need them are zeros.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with no_autocast(job.student.hidden.device):
            state = _forward(job)
        others = () if job.teacher is None else inputs_of(job.teacher)
        ctx.save_for_backward(*inputs, *others)  # a change in between is an error
        ctx.job, ctx.state = job, state
        log_prob = state.log_prob if job.targets is not None else torch.zeros_like(state.weight)
        # copies: backward reads the state, and a state that held results would never be freed
        own = (t.clone() for t in (state.divergence, state.entropy, state.teacher_entropy))
        divergence, entropy, teacher_entropy = own
        ctx.mark_non_differentiable(teacher_entropy)
        ctx.set_materialize_grads(False)
        return divergence, log_prob, entropy, teacher_entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        job, state = ctx.job, ctx.state
        needs = Needs(*ctx.needs_input_grad[1:])
        inputs = ctx.saved_tensors[: len(needs)]
        divergence, log_prob, entropy = (
            None if g is None else g.float().contiguous() for g in grads[:3]
        )
        state.weight = torch.zeros_like(state.weight) if divergence is None else divergence
        state.coefficient, state.entropy_weight = log_prob, entropy
        if divergence is None:
            job = job._replace(measure=None, teacher=None)
        with no_autocast(job.student.hidden.device):
            return None, *_gradients([Share(job, state, None)], needs, inputs)


class Part(NamedTuple):
    """Rows of a scalar loss that share a divergence, or have none."""

    rows: Tensor | None  # (R,) which rows; None: all
    job: Job

    def pick(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values.index_select(0, self.rows)

    def put(self, whole: Tensor, own: Tensor) -> Tensor:
        if self.rows is None:
            return whole.copy_(own)
        return whole.index_copy_(0, self.rows, own.to(whole.dtype))


class Streamed(torch.autograd.Function):
    """A scalar from per-row values, whose gradients are made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: list[Part],
        task: Task,
        combine: Callable[[RowValues], Tensor],  # the loss
        tally: Tally,
        *inputs: Tensor | None,  # in the order of Needs
    ) -> tuple[Tensor, ...]:
        with no_autocast(task.weight.device):
            bounded = task.tolerance > 0 and any(task.needs) and len(task.weight) > 0
            found = [_bounded_forward(part, task, bounded) for part in parts]
            states = [state for state, _ in found]
            values = _together(parts, states, task)
            loss = combine(values)
        ctx.weight, ctx.coefficient = task.weight, _coefficient(task, values)
        ctx.states = states
        ctx.parts = [
            part if own is None else _with_live(part, state, own, ctx.coefficient, task, tally)
            for part, (state, own) in zip(parts, found, strict=True)
        ]
        others = () if task.teacher is None else inputs_of(task.teacher)
        ctx.save_for_backward(*inputs, *others)  # a change in between is an error
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return loss, *values

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        needs = Needs(*ctx.needs_input_grad[4:])
        inputs = ctx.saved_tensors[: len(needs)]
        if grad is None:
            return (None,) * (4 + len(needs))
        shares = []
        for part, state in zip(ctx.parts, ctx.states, strict=True):
            coefficient = None if ctx.coefficient is None else part.pick(ctx.coefficient) * grad
            own = replace(state, weight=part.pick(ctx.weight) * grad, coefficient=coefficient)
            shares.append(Share(part.job, own, part.rows))
        with no_autocast(grad.device):
            return (None, None, None, None, *_gradients(shares, needs, inputs))


def _bounded_forward(part: Part, task: Task, bounded: bool) -> tuple[RowState, Blocks | None]:
    """The state of a part's rows, and bounds of their tiles if they are wanted."""
    if not bounded:
        return _forward(part.job), None
    state = RowState.fresh(part.pick(task.weight))
    blocks = part.job.backend.Stream(part.job).forward_with_bounds(state)
    _set_infinite(part.job, state)
    return state, blocks


def _with_live(
    part: Part,
    state: RowState,
    blocks: Blocks,
    coefficient: Tensor | None,
    task: Task,
    tally: Tally,
) -> Part:
    """The part, whose gradient has only the tiles that the tolerance does not leave out."""
    job, rows = part.job, len(state.weight)
    own = replace(state, coefficient=None if coefficient is None else part.pick(coefficient))
    setting = job.backend.Stream(job).setting
    choice = choose(setting, own, slice(0, rows), blocks, task.tolerance)
    tally.add(choice, blocks, rows, setting.vocabulary)
    return part._replace(job=job._replace(live=Live(choice.live, blocks.rows, blocks.columns)))


def _together(parts: list[Part], states: list[RowState], task: Task) -> RowValues:
    """As those of a *retain* sweep, in the order of the rows."""
    whole = RowValues(*(torch.zeros_like(task.weight) for _ in RowValues._fields))
    for part, state in zip(parts, states, strict=True):
        zeros = torch.zeros_like(state.divergence)
        targets, taught = task.targets is not None, part.job.measure is not None
        own = RowValues(
            state.divergence,
            state.log_prob if targets else zeros,
            state.entropy,
            state.teacher_entropy if taught else zeros,
            state.teacher_log_prob if targets and part.job.teacher is not None else zeros,
        )
        whole = RowValues(*(part.put(a, b) for a, b in zip(whole, own, strict=True)))
    return whole


def _coefficient(task: Task, values: RowValues) -> Tensor | None:
    """d loss / d log_prob of each row."""
    if task.coefficients is None:
        return task.coefficient
    teacher = values.teacher_log_prob if task.teacher_log_prob else None
    own = task.coefficients(0, len(values.log_prob), values.log_prob, teacher)
    return own if task.coefficient is None else task.coefficient + own


# ---- gradients -----------------------------------------------------------------------------------


class Share(NamedTuple):
    """What some rows add to the gradients."""

    job: Job
    state: RowState
    rows: Tensor | None  # (R,) which rows; None: all


def _gradients(
    shares: list[Share], needs: Needs, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """In the order of Needs and the dtypes of the inputs. Each block of the head's is written once,
    from all shares of the rows."""
    (job, state, _), *others = shares
    if job.classes is not None:
        assert not others
        return _gradients_by_rows(job, state, needs, inputs)
    of_rows = needs._replace(weight=False, bias=False, lora_b=False)
    of_head = needs._replace(hidden=False, low=False)
    sums = [new_gradients(share.job.student, of_rows) for share in shares]
    new = torch.empty_like if job.live is None else torch.zeros_like
    whole = [
        new(tensor) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, of_head, strict=True)
    ]
    columns = _columns([share.job for share in shares])
    streams = [s.job.backend.Stream(s.job).gradients(s.state, columns) for s in shares]
    for found in zip(*streams, strict=True):
        _, side, first = found[0]
        own = new_gradients(side, of_head)
        for i, (grad, part, _) in enumerate(found):
            both = own._replace(hidden=sums[i].hidden, low=sums[i].low)
            job.backend.accumulate(grad, part, both, add_weight=i > 0)
        block = slice(first, first + side.head.vocab_size)
        for target, gradient in zip(whole, own, strict=True):
            if target is not None and gradient is not None:
                target[block] = gradient
        del own, both, gradient  # before the next block's are made
    if job.student.head.shard is not None:
        job.student.head.shard.sum_(*(g for own in sums for g in (own.hidden, own.low)))
    rows = _of_all_rows(shares, sums, inputs)
    return tuple(a if a is not None else b for a, b in zip(rows, whole, strict=True))


def _columns(jobs: list[Job]) -> list[Chunk]:
    """Blocks of columns that all jobs take; where tiles may be left out, of whole tiles (at least
    one, even if the plan has fewer columns), and those that any job has a live one in."""
    vocabulary, block = jobs[0].student.head.vocab_size, min(job.block for job in jobs)
    lives = [job.live for job in jobs if job.live is not None]
    if not lives:
        return chunks(0, vocabulary, block)
    width = max(live.columns for live in lives)  # a multiple of each
    alive = torch.zeros(-(-vocabulary // width), dtype=torch.bool, device=lives[0].tiles.device)
    for live in lives:
        own = live.tiles.any(0).nonzero()[:, 0]
        alive[own * live.columns // width] = True
    whole = max(1, block // width) * width
    found = runs_of(alive.tolist(), width, vocabulary)
    return [part for run in found for part in chunks(*run, whole)]


def _of_all_rows(
    shares: list[Share], sums: list[Gradients], inputs: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The hidden states' and the LoRA's low ones."""
    found: list[Tensor | None] = []
    for i, tensor in enumerate(inputs):
        whole: Tensor | None = None
        for share, own in zip(shares, sums, strict=True):
            gradient = own[i]
            if gradient is None or tensor is None:
                continue
            if share.rows is None:
                whole = gradient.to(tensor.dtype)
            else:
                whole = torch.zeros_like(tensor) if whole is None else whole
                whole.index_copy_(0, share.rows, gradient.to(tensor.dtype))
        found.append(whole)
    return found


def _gradients_by_rows(
    job: Job, state: RowState, needs: Needs, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The same where the divergence is over classes: from logits of whole rows."""
    sweep = _row_sweep(job, state.weight, state.coefficient, needs)
    sweep.state.entropy_weight = state.entropy_weight
    sweep.run()
    return tuple(
        None if g is None or tensor is None else g.to(tensor.dtype)
        for g, tensor in zip(sweep.grads, inputs, strict=True)
    )
