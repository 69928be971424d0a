"""GPUs: which devices are, their guard and current stream, and whether a graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

GPUS = ("cuda", "xpu")  # ROCm calls itself cuda

Context = AbstractContextManager[object]


def capturing(device: torch.device) -> bool:
    """Whether a graph (of CUDA's kind) is being captured on a device's current stream.

    The host may not wait for the device then, so nothing is decided by what a tensor holds.
    """
    if device.type not in GPUS:
        return False
    module = torch.get_device_module(device)
    # torch.xpu of older versions captures no graphs
    return bool(getattr(module, "is_current_stream_capturing", bool)())


def guard(device: torch.device) -> Context:
    """Make a GPU the current one, which is where Triton launches."""
    if device.type not in GPUS:
        return nullcontext()
    return torch.get_device_module(device).device(device)


def current_stream(device: torch.device) -> Callable[[], Context]:
    """How another thread enters the stream that is current in this one; its device comes along."""
    if device.type not in GPUS:
        return nullcontext
    module = torch.get_device_module(device)
    stream = module.current_stream(device)
    return lambda: module.stream(stream)
