"""Buffers: large ones on a Linux CPU ask for huge pages, which halves what touching them costs."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 2**21
LEAST = 8 * HUGE_PAGE  # bytes
MADV_HUGEPAGE = 14


@functools.lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def empty(*shape: int, device: torch.device) -> Tensor:
    """fp32, not initialised."""
    tensor = torch.empty(shape, dtype=torch.float32, device=device)
    size = tensor.numel() * 4
    advise = _madvise() if device.type == "cpu" and size >= LEAST else None
    if advise is not None:
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        stop = (tensor.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        advise(start, max(0, stop - start), MADV_HUGEPAGE)  # advice: no harm where it is declined
    return tensor
