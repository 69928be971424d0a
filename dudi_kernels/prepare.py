"""From checked inputs to what a sweep takes: the backend, the plan, dtypes, and rows that count."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi_kernels import checks, devices
from dudi_kernels.autograd import no_autocast
from dudi_kernels.backends.gemms import converts
from dudi_kernels.checks import Rows
from dudi_kernels.classes import Classes
from dudi_kernels.devices import GPUS
from dudi_kernels.distributed import agree_on, new_sweep
from dudi_kernels.divergences import Measure
from dudi_kernels.plan import NO_ROW, ClassSizes, Plan, plan_block, plan_retain, prefers_recompute
from dudi_kernels.recompute import Job, Part, RowWise, Streamed
from dudi_kernels.skipping import Skipped, Tally
from dudi_kernels.sweep import Needs, Retain, RowValues, Side, Task, even, runs
from dudi_kernels.topk import Top

BACKENDS = ("auto", "torch", "triton")


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def pick_backend(name: str, device: torch.device) -> ModuleType:
    """`auto` is Triton on a GPU that it serves, where it is installed, and torch elsewhere."""
    checks.one_of("backend", name, BACKENDS)
    if name == "triton" and not _has_triton():
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if name == "triton" or (name == "auto" and device.type in GPUS and _has_triton()):
        import dudi_kernels.backends.triton as triton_backend

        if triton_backend.serves(device):
            return triton_backend
        if name == "triton":
            raise ValueError(
                "backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 before the first "
                f"import), NVIDIA's from compute capability 8.0 on, got {device}"
            )
    import dudi_kernels.backends.torch as torch_backend

    return torch_backend


def wanted_gradients(rows: Rows) -> Needs:
    """What autograd will ask for; `ctx.needs_input_grad` stays True under no_grad."""
    enabled = torch.is_grad_enabled()
    return Needs(*(enabled and t is not None and t.requires_grad for t in rows.inputs))


def with_low(rows: Rows) -> Rows:
    """With the inner product of the head's LoRA, which autograd takes on to A and the hidden."""
    lora = rows.head.lora
    if lora is None:
        return rows
    leaves = None if rows.leaves is None else _with_low_of_leaves(rows, rows.leaves)
    return rows._replace(low=lora.low(rows.hidden), leaves=leaves)


def _with_low_of_leaves(rows: Rows, leaves: Rows) -> Rows:
    """Autograd reads the numbers, which the leaves, zeros, don't have."""
    lora, own = rows.head.lora, leaves.head.lora
    assert lora is not None and own is not None
    with no_autocast(rows.hidden.device):
        a = lora.a.detach().float() + own.a
        hidden = rows.hidden.detach().float() + leaves.hidden
        return leaves._replace(low=replace(own, a=a).low(hidden))


def as_side(rows: Rows) -> Side:
    """Detached, hidden states in the dtype of their GEMMs.

    Under autocast that is autocast's; else the common one of hidden states and weight.
    The head's blocks follow where a GEMM of that dtype returns fp32, else both are fp32 in it.
    """
    hidden = rows.hidden.detach()
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(hidden.dtype, rows.head.weight.dtype)
    low = None if rows.low is None else rows.low.detach().float()
    return Side(hidden.to(dtype), rows.head.detach(), low)


def layout(
    device: torch.device,
    widths: tuple[int, ...],
    dtypes: set[torch.dtype],  # of hidden states and weights
    measures: list[Measure | None],
    backend: ModuleType,
) -> dict[str, Any]:
    """What a plan must know of GEMMs and steps."""
    packing = backend.packing(device, widths, dtypes)
    return {
        "widths": widths,
        "convert": packing is None and converts(device, dtypes),
        "packing": packing,
        "cached": device.type == "cpu",
        "temporaries": backend.needs_temporaries(device, measures),
    }


def _layout(sides: list[Side], measures: list[Measure | None], backend: ModuleType) -> dict:
    dtypes = {t.dtype for side in sides for t in (side.hidden, side.head.weight)}
    widths = tuple(side.head.width for side in sides)
    return layout(sides[0].hidden.device, widths, dtypes, measures, backend)


class Problem(NamedTuple):
    """What plans are made from."""

    device: torch.device
    rows: int
    vocab_size: int
    widths: tuple[int, ...]  # of the student's head, and the teacher's
    dtype: torch.dtype  # of the student's hidden states
    measures: Sequence[Measure | None]
    both: dict[str, Any]  # `layout` of the sides
    alone: dict[str, Any]  # of the student
    backend: ModuleType
    budget: int
    classes: ClassSizes | None = None  # that the divergences are over
    restricted: bool = False  # whether the teacher is, to its likeliest tokens (nucleus.py)
    top_k: int = 0  # of its likeliest tokens, where these alone are known

    @classmethod
    def of(
        cls,
        sides: list[Side],
        measures: list[Measure | None],
        backend: ModuleType,
        budget: int,
        classes: Classes | None = None,
        restricted: bool = False,
        top: Top | None = None,
    ) -> Problem:
        if top is not None:  # the steps see no divergence
            measures = [None]
        hidden, both = sides[0].hidden, _layout(sides, measures, backend)
        sizes = None
        if classes is not None and len(sides) > 1:
            sizes = classes.sizes(sides[1].head.vocab_size, both["temporaries"])
        return cls(
            hidden.device,
            len(hidden),
            sides[0].head.planned_size,
            tuple(side.head.width for side in sides),
            hidden.dtype,
            measures,
            both,
            _layout(sides[:1], measures, backend),
            backend,
            budget,
            sizes,
            restricted,
            0 if top is None else top.ids.shape[1],
        )

    @property
    def by_rows(self) -> bool:
        """Whether a divergence needs whole rows of logits."""
        adaptive = any(measure is not None and measure.adaptive for measure in self.measures)
        return adaptive or self.restricted or self.classes is not None or self.top_k > 0

    @property
    def fuses(self) -> bool:
        """Whether kernels project in *recompute*."""
        return self.backend.fuses(self.device) and not self.by_rows

    def retain(self, skips: bool = False) -> Plan:
        """Of a scalar loss; NO_ROW where only *recompute* fits the budget.

        `skips`: tiles of the gradient may be left out; their masses take temporaries.
        """
        apart = skips or self.restricted  # steps that are never compiled
        settings = self.both | {"temporaries": self.both["temporaries"] or apart}
        try:
            return plan_retain(
                self.vocab_size,
                budget=self.budget,
                classes=self.classes,
                top_k=self.top_k,
                **settings,
            )
        except ValueError:
            if not self.fuses:
                raise
        self.recompute()
        return NO_ROW

    def recompute(self) -> tuple[int, int]:
        """Columns of a block, and rows of a tile; kernels take the teacher's side as it is."""
        if self.classes is not None:  # whole rows, in both passes
            return self.vocab_size, self.retain().tile_rows
        device, rows, vocab_size = self.device, self.rows, self.vocab_size
        cell, _ = self.backend.stream_bytes(device, self.dtype, rows, vocab_size, len(self.widths))
        return plan_block(
            rows,
            budget=self.budget,
            cell=cell,
            whole_rows=vocab_size if self.by_rows else 0,
            **(self.alone if self.fuses else self.both),
        )

    def streams(self, plan: Plan) -> bool:
        """Whether *recompute* serves a scalar loss: chosen by cost, of what the budget holds."""
        if not self.fuses or plan == NO_ROW:
            return self.fuses
        chunk_rows = even(self.rows, plan.chunk_rows)
        if not prefers_recompute(
            self.rows,
            self.vocab_size,
            self.widths,
            self.dtype.itemsize,
            chunk_rows,
            self.backend.balance(self.device, self.dtype),
        ):
            return False
        try:
            self.recompute()
        except ValueError:
            return False
        return True


def make_plan(
    student: Side,
    teacher: Side | None,
    measures: list[Measure | None],
    backend: ModuleType,
    memory_budget: int,
    skips: bool = False,
    classes: Classes | None = None,
    top_p: float = 1.0,
    top: Top | None = None,
) -> Plan:
    checks.budget(memory_budget)
    sides = [side for side in (student, teacher) if side is not None]
    problem = Problem.of(sides, measures, backend, memory_budget, classes, top_p < 1, top)
    return problem.retain(skips)


def scalar(
    rows: Rows,
    task: Task,
    combine: Callable[[RowValues], Tensor],
    backend: ModuleType,
    memory_budget: int,
) -> tuple[Tensor, RowValues, Skipped]:
    """The loss of a task, tied to the student's inputs, the per-row values, and what was left out:
    by *retain*, or by *recompute* where kernels make it cheaper."""
    streamed = streams(task, backend, memory_budget)
    agree_on(
        (task.student, task.teacher),
        "a scalar loss",
        task.needs,
        (*task.plan, streamed),
        [span.measure for span in task.spans],
        [span[:2] for span in task.spans],
        task.groups,
        (task.inv_tau, task.teacher_inv_tau, task.teacher_log_prob),
    )
    if not streamed:
        sweep = new_sweep(task, backend)
        return *retain(rows, sweep, combine), sweep.tally.result()
    tally = Tally(task.weight.device)
    parts = _parts(task, backend, memory_budget)
    loss, *values = Streamed.apply(parts, task, combine, tally, *rows.inputs)
    return loss, RowValues(*values), tally.result()


def _problem(task: Task, backend: ModuleType, memory_budget: int) -> Problem:
    sides = [side for side in (task.student, task.teacher) if side is not None]
    measures: list[Measure | None] = [span.measure for span in task.spans]
    restricted = task.teacher_top_p < 1
    return Problem.of(sides, measures, backend, memory_budget, task.classes, restricted, task.top)


def streams(task: Task, backend: ModuleType, memory_budget: int) -> bool:
    """Whether *recompute* serves a scalar loss."""
    return _problem(task, backend, memory_budget).streams(task.plan)


def _shared(task: Task) -> list[tuple[Measure | None, Tensor | None]]:
    """Each divergence (None: none) and the rows that have it; None: all rows."""
    own: dict[Measure | None, list[Tensor]] = {}
    for start, stop, measure in runs(task.spans, 0, len(task.weight)):
        # made there: a copy to the device would wait for it
        own.setdefault(measure, []).append(torch.arange(start, stop, device=task.weight.device))
    if len(own) < 2:
        return [(next(iter(own), None), None)]
    return [(measure, torch.cat(rows)) for measure, rows in own.items()]


def _parts(task: Task, backend: ModuleType, memory_budget: int) -> list[Part]:
    """One for each divergence; their blocks are in memory together."""
    parts = [
        Part(index, _part_job(task, measure, index, backend, memory_budget))
        for measure, index in _shared(task)
    ]
    if len(parts) == 1:
        return parts
    block, _ = _problem(task, backend, memory_budget).recompute()
    return [part._replace(job=part.job._replace(block=block)) for part in parts]


def _part_job(
    task: Task,
    measure: Measure | None,
    index: Tensor | None,
    backend: ModuleType,
    memory_budget: int,
) -> Job:
    student, targets = task.student, task.targets
    teacher = task.teacher if measure is not None or task.teacher_log_prob else None
    if index is not None:
        student = student.pick(index)
        teacher = None if teacher is None else teacher.pick(index)
        targets = None if targets is None else targets.index_select(0, index)
    temperatures = 1 / task.inv_tau, 1 / task.teacher_inv_tau
    return make_job(
        student, teacher, measure, targets, temperatures, backend, memory_budget, entropy=True
    )


def retain(rows: Rows, *arguments: object) -> tuple[Tensor, RowValues]:
    """The loss, tied to the student's inputs, and the per-row values."""
    loss, *values = Retain.apply(*arguments, *rows.inputs)
    return loss, RowValues(*values)


def row_wise(
    student: Rows,
    teacher: Rows | None,
    measure: Measure | None,
    targets: Tensor | None,
    temperatures: tuple[float, float],  # of the divergence: student's, teacher's
    backend: ModuleType,
    memory_budget: int,
    *,
    entropy: bool,
    classes: Classes | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N,) divergence, log_prob, entropy and teacher_entropy; all but the last differentiable."""
    learner, guide = as_side(student), None if teacher is None else as_side(teacher)
    job = make_job(
        learner,
        guide,
        measure,
        targets,
        temperatures,
        backend,
        memory_budget,
        entropy=entropy,
        classes=classes,
    )
    needs, plan = wanted_gradients(student), (job.block, *(job.row_plan or ()))
    agree_on((learner, guide), "a loss per row", needs, plan, [measure], temperatures, entropy)
    return RowWise.apply(job, *student.inputs)


def make_job(
    student: Side,
    teacher: Side | None,
    measure: Measure | None,
    targets: Tensor | None,
    temperatures: tuple[float, float],
    backend: ModuleType,
    memory_budget: int,
    *,
    entropy: bool,
    classes: Classes | None = None,
) -> Job:
    checks.budget(memory_budget)
    sides = [side for side in (student, teacher) if side is not None]
    problem = Problem.of(sides, [measure], backend, memory_budget, classes)
    block, tile_rows = problem.recompute()
    return Job(
        student=student,
        teacher=teacher,
        targets=targets,
        measure=measure,
        entropy=entropy,
        inv_tau=1 / temperatures[0],
        teacher_inv_tau=1 / temperatures[1],
        block=block,
        tile_rows=tile_rows,
        row_plan=problem.retain() if problem.by_rows else None,
        backend=backend,
        classes=classes,
    )


def log_prob(
    rows: Rows, targets: Tensor, temperature: float, backend: ModuleType, memory_budget: int
) -> Tensor:
    """(N,) log q[target], differentiable by row; a temperature is a scale of the head."""
    _, values, _, _ = row_wise(
        rows._replace(head=rows.head.scaled(1 / temperature)),
        None,
        None,
        targets,
        (1.0, 1.0),
        backend,
        memory_budget,
        entropy=False,
    )
    return values


class Counted:
    """The rows that count; what is ignored never reaches a sweep, not even as NaN.

    Ignored rows are left out; while a CUDA graph is captured, where the host can't know how many
    they are, there are zeros in their place.
    """

    def __init__(self, rows: Rows, targets: Tensor | None, ignore_index: int):
        self.whole = rows
        self.index: Tensor | None = None  # of the rows that count, where others are left out
        self.ignored: Tensor | None = None  # where there are zeros
        ignored = None if targets is None else targets == ignore_index
        if ignored is None:
            return
        if devices.capturing(ignored.device):
            self.ignored = ignored
        elif bool(ignored.any()):
            self.index = (~ignored).nonzero()[:, 0]

    def pick(self, values: Tensor) -> Tensor:
        if self.index is not None:
            return values.index_select(0, self.index)
        return values if self.ignored is None else self._zeroed(values)

    def _zeroed(self, values: Tensor) -> Tensor:
        assert self.ignored is not None
        return values.masked_fill(self.ignored.view(-1, *[1] * (values.ndim - 1)), 0)

    def rows(self, rows: Rows) -> Rows:
        return with_low(rows.change(self.pick))

    def weight(self, given: Tensor | None) -> Tensor:
        """Of the rows in the loss; without any given, the mean's."""
        if given is not None:
            return self.pick(given)
        hidden = self.whole.hidden
        counts = self.pick(torch.ones(len(hidden), device=hidden.device))
        return counts / counts.sum().clamp(min=1)

    def put_back(self, values: Tensor) -> Tensor:
        """In the leading shape of the inputs, 0 for ignored rows."""
        if self.index is not None:
            values = values.new_zeros(len(self.whole.hidden)).index_copy(0, self.index, values)
        elif self.ignored is not None:
            values = self._zeroed(values)
        return values.view(self.whole.shape)


def on_device(ids: Tensor, device: torch.device) -> Tensor:
    """Packed rows' segment ids, made on the device run by run: a copy would wait for it."""
    if ids.device == device:
        return ids
    values, counts = ids.unique_consecutive(return_counts=True)
    runs = zip(values.tolist(), counts.tolist(), strict=True)
    none = torch.empty(0, dtype=ids.dtype, device=device)
    return torch.cat(
        [none] + [torch.full((n,), i, dtype=ids.dtype, device=device) for i, n in runs]
    )
