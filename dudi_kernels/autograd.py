"""What the autograd Functions of both strategies share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """fp32 stays fp32 in here."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


Leaf = Callable[[Tensor], Tensor]
_leaf: ContextVar[Leaf | None] = ContextVar("leaf", default=None)


@contextmanager
def fp32_gradients(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """In here a scalar loss has its gradients in these leaves of the same shapes.

    Autograd rounds a gradient to the dtype of its tensor, before any scale of the loss is known.
    The leaves are zeros without memory of their own: numbers are those of the tensors.
    """
    own = {tensor: _zeros(tensor).requires_grad_() for tensor in tensors}
    token = _leaf.set(lambda tensor: own[tensor] if tensor in own else _zeros(tensor))
    try:
        yield list(own.values())
    finally:
        _leaf.reset(token)


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros((), dtype=torch.float32).expand(tensor.shape)


def leaf() -> Leaf | None:
    """Of a tensor, inside of `fp32_gradients`."""
    return _leaf.get()


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
