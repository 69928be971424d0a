"""What must be finite in a run, and the error that stops it when something is not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dudi.sharding import local


class NonFiniteLossError(RuntimeError):
    """Loss, gradient, sample or weights are NaN or infinite; names the step and dataset rows."""


def gradients_are_finite(model: nn.Module) -> bool:
    """Of a sharded model, this rank's part."""
    return _are_finite(local(p.grad) for p in model.parameters() if p.grad is not None)


def weights_are_finite(model: nn.Module) -> bool:
    """Of the trainable weights: the others never change. Of a sharded model, this rank's part."""
    return _are_finite(local(p.detach()) for p in model.parameters() if p.requires_grad)


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """One read of the tensors and one wait for the device; extremes carry NaN and can't overflow,
    as a norm could."""
    extremes = [end.float() for t in tensors if t.numel() for end in t.aminmax()]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())
