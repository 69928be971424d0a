"""Triton kernels: on NVIDIA, AMD and Intel GPUs, and anywhere under TRITON_INTERPRET=1.

*retain*: GEMMs by torch, element-wise steps by one read of the logits for the statistics, and one
read and one write for the gradient. *recompute*: both projections inside the kernels, so that no
logit is ever stored; what is stored of the gradient is a block of columns, for the last two GEMMs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dudi_kernels.adaptive import mix
from dudi_kernels.backends.gemms import accumulate, gradient_dtype, packing, project
from dudi_kernels.backends.triton.elements import INTERPRETED
from dudi_kernels.backends.triton.launch import Launcher, Sides, Source, partial_bytes
from dudi_kernels.divergences import Measure
from dudi_kernels.recompute import Job
from dudi_kernels.sweep import Side, chunks
from dudi_kernels.tiles import RowState, Setting, Steps, Tile

__all__ = [
    "Stream",
    "accumulate",
    "fuses",
    "needs_temporaries",
    "packing",
    "project",
    "serves",
    "steps",
    "stream_bytes",
]

KINDS = ("cuda", "xpu")  # ROCm calls itself cuda


def serves(device: torch.device) -> bool:
    """Whether kernels can run on a device; a CPU only interprets them."""
    return device.type in KINDS or (INTERPRETED and device.type == "cpu")


def needs_temporaries(device: torch.device, measures: list[Measure | None]) -> bool:
    """Whether `steps` holds temporaries of a tile: where a divergence is adaptive."""
    return any(measure is not None and measure.adaptive for measure in measures)


def fuses(device: torch.device) -> bool:
    """Whether projections are made in the kernels, so that *recompute* stores no logits."""
    return True


def stream_bytes(
    device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int, sides: int
) -> tuple[int, int]:
    """What `Stream` holds for each row and column of a block, and in the forward pass besides: the
    gradient of the logits, and partial results."""
    partials = partial_bytes(device, dtype, rows, vocabulary)
    return gradient_dtype(device, dtype).itemsize, partials


def steps(setting: Setting, state: RowState, tile: Tile, wanted: Steps) -> None:
    """Take the wanted steps over rows of whole logits, in place."""
    rows, columns = tile.student.shape
    assert columns == setting.vocabulary and tile.first_column == 0  # whole rows
    if rows == 0:
        return
    measure = tile.measure
    student = Source(setting.softcap, setting.scale, logits=tile.student)
    teacher = None if tile.teacher is None else Source(None, 1.0, logits=tile.teacher)
    launch = Launcher(
        setting, state, Sides(student, teacher), rows, columns, first_row=tile.first_row
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

    def _launcher(self, state: RowState, start: int, stop: int) -> Launcher:
        student, teacher = (
            None if side is None else Source.of(side.part(start, stop))
            for side in (self.job.student, self.job.teacher)
        )
        assert student is not None
        rows = len(self.job.student.hidden)
        return Launcher(
            self.setting, state, Sides(student, teacher), rows, stop - start, first_column=start
        )

    def forward(self, state: RowState) -> None:
        """Statistics of all rows, and the sums that are wanted."""
        job = self.job
        if not len(job.student.hidden):
            return
        launch = self._launcher(state, 0, job.student.head.vocab_size)
        wanted = job.entropy or job.measure is not None
        chained = job.measure is None or job.measure.chain is not None
        launch.statistics(True, job.teacher is not None, job.measure, wanted and chained)
        if wanted and not chained:
            launch.sums(job.measure)

    def gradients(self, state: RowState) -> Iterator[tuple[Tensor, Side, int]]:
        """The gradient of the logits by blocks of columns, the student's side, the first column."""
        job, hidden = self.job, self.job.student.hidden
        vocabulary = job.student.head.vocab_size
        dtype = gradient_dtype(hidden.device, hidden.dtype)
        size = len(hidden) * min(job.block, vocabulary)
        buffer = torch.empty(size, dtype=dtype, device=hidden.device)
        for start, stop in chunks(0, vocabulary, job.block):
            out = buffer[: len(hidden) * (stop - start)].view(len(hidden), stop - start)
            if len(hidden):
                self._launcher(state, start, stop).gradient(job.measure, out)
            yield out, job.student.part(start, stop), start
