"""What the autograd Functions of both strategies share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def no_autocast(device: torch.device) -> torch.autocast:
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


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
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
