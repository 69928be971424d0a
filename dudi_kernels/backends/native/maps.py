"""The maps between tokens and classes, compiled (maps.h); as those of backends/maps.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dudi_kernels.backends import native
from dudi_kernels.classes import Classes, Group, Shared

POINTERS = ("from", "classes", "shares", "out")
STRIDES = ("from_stride", "classes_stride", "shares_stride", "out_stride")


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("classes", "members", "log_weights")),
        *((name, ctypes.c_int64) for name in ("count", "width")),
    ]


class _Map(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in (*STRIDES, "count")),
        *((name, ctypes.c_void_p) for name in ("first", "second")),
        ("inv_tau", ctypes.c_float),
    ]


def class_logits(groups: Sequence[Group], logits: Tensor, inv_tau: float, out: Tensor) -> None:
    """log sum_u M_uk exp(inv_tau logits_u)."""
    own = (_Group * len(groups))(
        *(
            _Group(
                group.classes.data_ptr(),
                group.members.data_ptr(),
                None if group.log_weights is None else group.log_weights.data_ptr(),
                *group.members.shape,
            )
            for group in groups
        )
    )
    about = _about(inv_tau, {"from": logits, "out": out})
    _run("dudi_class_logits", logits.shape, about, own, ctypes.c_int64(len(groups)))


def shares(
    shared: Shared, logits: Tensor, inv_tau: float, class_logits: Tensor, out: Tensor
) -> None:
    """exp(inv_tau logits_v - class_logits_k)."""
    about = _about(
        inv_tau,
        {"from": logits, "classes": class_logits, "out": out},
        shared.tokens,
        shared.classes,
    )
    _run("dudi_shares", out.shape, about)


def pull(classes: Classes, grad: Tensor, shares: Tensor, inv_tau: float, out: Tensor) -> None:
    """The gradient of the class logits in those of the tokens."""
    about = _about(
        inv_tau,
        {"from": grad, "shares": shares, "out": out},
        classes.student_class,
        classes.places,
    )
    _run("dudi_pull", out.shape, about)


def _about(
    inv_tau: float,
    tensors: dict[str, Tensor],
    first: Tensor | None = None,  # (count,) int64
    second: Tensor | None = None,  # (count,) int64
) -> _Map:
    about = _Map(inv_tau=inv_tau)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and (tensor.shape[1] < 2 or tensor.stride(1) == 1)
        setattr(about, name, tensor.data_ptr())
        setattr(about, f"{name}_stride", tensor.stride(0))
    if first is not None and second is not None:
        about.count, about.first, about.second = len(first), first.data_ptr(), second.data_ptr()
    return about


def _run(name: str, shape: torch.Size, about: _Map, *others: Any) -> None:
    """Over rows, which threads share."""
    loaded = native.library()
    assert loaded is not None
    rows, columns = shape
    if rows == 0:
        return
    native.over_rows(getattr(loaded, name), rows, columns, ctypes.byref(about), *others)
