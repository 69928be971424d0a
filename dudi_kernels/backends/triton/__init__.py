"""Triton kernels: on NVIDIA, AMD and Intel GPUs, and anywhere under TRITON_INTERPRET=1.

*retain*: GEMMs by torch, element-wise steps by one read of the logits for the statistics, and one
read and one write for the gradient. *recompute*: both projections inside the kernels, so that no
logit is ever stored; what is stored of the gradient is a block of columns, for the last two GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor

from dudi_kernels.adaptive import mix
from dudi_kernels.backends.gemms import accumulate, gradient_dtype, packing, project
from dudi_kernels.backends.triton.elements import INTERPRETED
from dudi_kernels.backends.triton.kernels import (
    MASS,
    MASS_FIELDS,
    MASS_GAP,
    TEACHER_MASS,
    TEMPERED_MASS,
)
from dudi_kernels.backends.triton.launch import (
    OLDEST,
    Launcher,
    Sides,
    Source,
    flops_per_byte,
    partial_bytes,
    planned,
)
from dudi_kernels.backends.triton.maps import class_logits, pull, shares
from dudi_kernels.devices import GPUS
from dudi_kernels.divergences import Measure
from dudi_kernels.reach import REACH
from dudi_kernels.recompute import Job, nothing
from dudi_kernels.skipping import Blocks, Masses, bounds
from dudi_kernels.sweep import Chunk, Side, chunks
from dudi_kernels.tiles import RowState, Setting, Steps, Tile, log_probs

__all__ = [
    "Stream",
    "accumulate",
    "balance",
    "class_logits",
    "fuses",
    "needs_temporaries",
    "packing",
    "project",
    "pull",
    "serves",
    "shares",
    "steps",
    "stream_bytes",
]


def serves(device: torch.device) -> bool:
    """Whether kernels can run on a device; a CPU only interprets them, and NVIDIA's tensor cores
    before Ampere's are none to Triton: projections would spill kilobytes."""
    if device.type not in GPUS:
        return INTERPRETED and device.type == "cpu"
    target = planned(device)
    return target.kind != "cuda" or target.capability >= OLDEST


def needs_temporaries(device: torch.device, measures: list[Measure | None]) -> bool:
    """Whether `steps` holds temporaries of a tile: where a divergence is adaptive."""
    return any(measure is not None and measure.adaptive for measure in measures)


def fuses(device: torch.device) -> bool:
    """Whether projections are made in the kernels, so that *recompute* stores no logits."""
    return True


def balance(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs of a projection in a kernel that take as long as a byte of memory."""
    return flops_per_byte(planned(device), dtype)


def stream_bytes(
    device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int, sides: int
) -> tuple[int, int]:
    """What `Stream` holds for each row and column of a block, and in the forward pass besides: the
    gradient of the logits, and partial results."""
    partials = partial_bytes(device, dtype, rows, vocabulary)
    return gradient_dtype(device, dtype).itemsize, partials


def steps(setting: Setting, state: RowState, tile: Tile, wanted: Steps) -> None:
    """Take the wanted steps over rows of whole logits (the gradient: of some columns), in place."""
    rows, columns = tile.student.shape
    assert columns == setting.vocabulary or wanted == Steps(gradient=True)
    if rows == 0:
        return
    measure = tile.measure
    student = Source(setting.softcap, setting.scale, logits=tile.student)
    teacher = None if tile.teacher is None else Source(None, 1.0, logits=tile.teacher)
    launch = Launcher(
        setting,
        state,
        Sides(student, teacher),
        rows,
        columns,
        first_row=tile.first_row,
        first_column=tile.first_column,
    )
    chained = measure is None or measure.chain is not None
    ready = wanted.statistics and (measure is None or wanted.teacher_statistics)
    one_pass = wanted.sums and chained and ready
    if wanted.statistics or wanted.teacher_statistics:
        launch.statistics(wanted.statistics, wanted.teacher_statistics, measure, one_pass)
    if wanted.mixture:
        for start, stop in chunks(0, rows, setting.tile_rows):
            assert tile.teacher is not None
            part = tile._replace(
                student=tile.student[start:stop],
                teacher=tile.teacher[start:stop],
                first_row=tile.first_row + start,
            )
            mix(setting, state, part)
    if wanted.sums and not one_pass:
        launch.sums(measure)
    if wanted.gradient:
        launch.gradient(measure, tile.student)


class Stream:
    """*recompute*: one fused pass forward (two where a divergence needs whole rows first); in the
    backward pass the gradient of the logits, a block of columns at a time."""

    def __init__(self, job: Job):
        self.job = job
        head, teacher = job.student.head, job.teacher
        self.setting = Setting.of(
            head,
            None if teacher is None else teacher.head,
            job.targets,
            (job.inv_tau, job.teacher_inv_tau),
            job.tile_rows,
        )

    def _launcher(self, state: RowState, columns: Chunk, rows: Chunk) -> Launcher:
        student, teacher = (
            None if side is None else Source.of(side.part(*columns).rows(*rows))
            for side in (self.job.student, self.job.teacher)
        )
        assert student is not None
        return Launcher(
            self.setting,
            state,
            Sides(student, teacher),
            rows[1] - rows[0],
            columns[1] - columns[0],
            first_row=rows[0],
            first_column=columns[0],
        )

    @property
    def _whole(self) -> tuple[Chunk, Chunk]:
        """Columns and rows."""
        return (0, self.setting.vocabulary), (0, len(self.job.student.hidden))

    def forward(self, state: RowState, between: Callable[[], None] = nothing) -> None:
        """Statistics of all rows, and the sums that are wanted; `between` the two where they are
        two passes."""
        if len(self.job.student.hidden):
            self._forward(self._launcher(state, *self._whole), between)

    def _forward(
        self, launch: Launcher, between: Callable[[], None] = nothing, masses: Tensor | None = None
    ) -> None:
        job = self.job
        wanted = job.entropy or job.measure is not None
        chained = job.measure is None or job.measure.chain is not None
        taught = job.teacher is not None
        launch.statistics(True, taught, job.measure, wanted and chained, masses)
        if wanted and not chained:
            between()
            launch.sums(job.measure)

    def forward_with_bounds(self, state: RowState) -> Blocks:
        """As `forward`; and what each tile's gradient is bounded by. Rows go through in parts:
        the masses of their tiles take no more than the gradient's buffer will."""
        columns, (_, rows) = self._whole
        height, width = self._launcher(state, *self._whole).tile()
        tiles = -(-columns[1] // width)
        step = rows * min(self.job.block, columns[1]) // (MASS_FIELDS * tiles * height)
        parts: list[Blocks] = []
        for part in chunks(0, rows, max(1, step) * height):
            logs = torch.empty(MASS_FIELDS, tiles, part[1] - part[0], device=state.weight.device)
            self._forward(self._launcher(state, columns, part), masses=logs)
            own, measure = slice(*part), self.job.measure
            found = _masses(self.setting, state, own, logs, measure)
            bounded = bounds(self.setting, state, own, measure, found, width)
            parts.append(Blocks.of(bounded, found, height, width))
        divergence, weight, mass = (
            torch.cat(tensors) for tensors in zip(*(p[:3] for p in parts), strict=True)
        )
        return Blocks(divergence, weight, mass, height, width)

    def gradients(
        self, state: RowState, columns: list[Chunk]
    ) -> Iterator[tuple[Tensor, Side, int]]:
        """The gradient of the logits by these blocks, the student's side, the first column."""
        job, hidden = self.job, self.job.student.hidden
        live = None if job.live is None else job.live.tiles
        rows = len(hidden)
        dtype = gradient_dtype(hidden.device, hidden.dtype)
        size = rows * max((b - a for a, b in columns), default=0)
        buffer = torch.empty(size, dtype=dtype, device=hidden.device)
        for start, stop in columns:
            out = buffer[: rows * (stop - start)].view(rows, stop - start)
            if rows:
                launch = self._launcher(state, (start, stop), (0, rows))
                launch.gradient(job.measure, out, live)
            yield out, job.student.part(start, stop), start


def _masses(
    setting: Setting, state: RowState, own: slice, logs: Tensor, measure: Measure | None
) -> Masses:
    """From log-sum-exps of rows in tiles (MASS_FIELDS, T, R)."""

    def mass(field: tl.constexpr, log_sum: Tensor) -> Tensor:
        return log_probs(logs[field.value].t(), log_sum[own], 1.0, True).exp_()

    student = mass(MASS, state.log_sum)
    if measure is None:
        return Masses(student, student, None, None)
    tempered, ratio = student, None
    if setting.inv_tau != 1.0:
        tempered = mass(TEMPERED_MASS, state.tempered_log_sum)
    if REACH[measure.terms].ratio:
        apart = (state.tempered_log_sum[own] - state.teacher_tempered_log_sum[own]).float()
        ratio = (logs[MASS_GAP.value].t() - apart[:, None]).clamp_(min=0)
    return Masses(student, tempered, mass(TEACHER_MASS, state.teacher_tempered_log_sum), ratio)
