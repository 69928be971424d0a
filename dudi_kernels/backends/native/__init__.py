"""The compiled element-wise steps (rows.cpp), for fp32 tiles on a CPU; called through ctypes.

`setup.py` builds one library for each instruction set; the one that fits this machine is loaded.
Without a compiler, or where the sources have changed since the build, there is none, and the torch
backend takes its steps in torch. DUDI_NATIVE=0 does the same. Rows are split over torch's number of
threads; results do not depend on it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dudi_kernels.backends.native.generate import fingerprint
from dudi_kernels.divergences import Measure, distinct
from dudi_kernels.tiles import RowState, Setting, Steps, Tile, smooth_mask

NUMBER = {terms: number for number, terms in enumerate(distinct())}
NO_MEASURE = -1
LEAST = 20_000  # elements that are worth a thread
LEVELS = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}  # by torch's name of the machine's


class _Tile(ctypes.Structure):
    """`struct Tile` of rows.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("student", "teacher")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "student_stride",
                "teacher_stride",
                "columns",
                "first_column",
                "vocabulary",
            )
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "targets",
                "log_sum",
                "tempered_log_sum",
                "teacher_log_sum",
                "teacher_tempered_log_sum",
                "target",
                "teacher_target",
                "divergence",
                "g_sum",
                "entropy",
                "teacher_entropy",
                "poles",
                "weight",
                "coefficient",
                "entropy_weight",
                "mixture",
            )
        ),
        *(
            (name, ctypes.c_float)
            for name in ("inv_tau", "teacher_inv_tau", "a", "b", "softcap", "scale")
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "measure",
                "masked",
                "smooth_mask",
                "statistics",
                "teacher_statistics",
                "mix",
                "sums",
                "gradient",
            )
        ),
    ]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library that fits this machine and these sources, or None."""
    if os.environ.get("DUDI_NATIVE") == "0":
        return None
    for level in (*LEVELS.get(torch.backends.cpu.get_cpu_capability(), ()), "base"):
        spec = importlib.util.find_spec(f"{__name__}._rows_{level}")
        if spec is None or spec.origin is None:
            continue
        loaded = ctypes.CDLL(spec.origin)
        loaded.dudi_fingerprint.restype = ctypes.c_char_p
        loaded.dudi_rows.argtypes = [ctypes.POINTER(_Tile), ctypes.c_int64, ctypes.c_int64]
        loaded.dudi_rows.restype = None
        if loaded.dudi_fingerprint().decode() == fingerprint():
            return loaded
    return None


def takes(device: torch.device, measures: list[Measure | None]) -> bool:
    """Whether a sweep on `device` with these divergences can be served."""
    known = all(m is None or m.terms in NUMBER for m in measures)
    return device.type == "cpu" and known and library() is not None


@functools.lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dudi")


def steps(setting: Setting, state: RowState, tile: Tile, wanted: Steps) -> None:
    """Take the steps over a tile."""
    loaded = library()
    assert loaded is not None
    rows, columns = tile.student.shape
    if rows == 0:
        return
    arguments = _arguments(setting, state, tile, wanted)
    over_rows(loaded.dudi_rows, rows, columns, arguments)


def over_rows(function: Callable[..., None], rows: int, columns: int, *arguments: Any) -> None:
    """Call a function of (*arguments, first row, end), which threads share."""
    threads = min(torch.get_num_threads(), rows, max(1, rows * columns // LEAST))
    bounds = [rows * i // threads for i in range(threads + 1)]
    spread(
        function,
        [(*arguments, ctypes.c_int64(a), ctypes.c_int64(b)) for a, b in pairwise(bounds)],
    )


def spread(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    """The first call here, and each other one in a thread of its own."""
    own, *others = calls
    jobs = [_pool(len(others), os.getpid()).submit(function, *call) for call in others]
    function(*own)
    wait(jobs)


def _arguments(setting: Setting, state: RowState, tile: Tile, wanted: Steps) -> _Tile:
    first, measure, teacher = tile.first_row, tile.measure, tile.teacher
    if measure is None or not measure.adaptive:
        state = replace(state, mixture=None)
    assert tile.student.stride(1) == 1 and (teacher is None or teacher.stride(1) == 1)

    def at(values: Tensor | None) -> int | None:
        assert values is None or values.is_contiguous()
        return None if values is None else values.data_ptr() + first * values.element_size()

    return _Tile(
        student=tile.student.data_ptr(),
        teacher=None if teacher is None else teacher.data_ptr(),
        student_stride=tile.student.stride(0),
        teacher_stride=0 if teacher is None else teacher.stride(0),
        columns=tile.student.shape[1],
        first_column=tile.first_column,
        vocabulary=setting.vocabulary,
        targets=at(setting.targets),
        **{name: at(values) for name, values in vars(state).items()},
        inv_tau=setting.inv_tau,
        teacher_inv_tau=setting.teacher_inv_tau,
        a=0.0 if measure is None else measure.a,
        b=0.0 if measure is None else measure.b,
        softcap=setting.softcap or 0.0,
        scale=setting.scale,
        measure=NO_MEASURE if measure is None else NUMBER[measure.terms],
        masked=setting.masked,
        smooth_mask=0 if measure is None else smooth_mask(measure),
        statistics=wanted.statistics,
        teacher_statistics=wanted.teacher_statistics,
        mix=wanted.mixture,
        sums=wanted.sums,
        gradient=wanted.gradient,
    )
