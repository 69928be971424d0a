"""Maps between tokens and classes (classes.py) as kernels that walk them by index.

A program makes the class logits of some classes with about as many members each, so that it costs
what they have; a class with very many is summed in a loop. Sums have a fixed order, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dudi_kernels.backends.triton import launch
from dudi_kernels.backends.triton.elements import INTERPRETED
from dudi_kernels.classes import ALONE, Classes, Group, Shared

ROWS = 32 if INTERPRETED else 1  # of a program
MEMBERS = 1024  # that it reads of a row at once
WIDEST = 128  # members of a class at once; more come in a loop
WARPS = 4


@triton.jit(do_not_specialize=["rows", "count"])
def make_class_logits(
    logits,  # (rows, tokens)
    classes,  # (count,)
    members,  # (count, width)
    log_weights,  # (count, width)
    out,  # (rows, classes)
    logits_stride,
    out_stride,
    rows,
    count,
    width,
    inv_tau,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log sum_u exp(log M_uk + inv_tau logits_u) of classes, online over their members."""
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    k = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (i < rows) & (k < count)
    row = logits + i.to(tl.int64) * logits_stride
    top = tl.full((ROWS, BLOCK), -float("inf"), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if WIDTH == 1:
        top = tl.load(row + tl.load(members + k, mask=k < count, other=0), mask=inside, other=0.0)
        top *= inv_tau
        if WEIGHTED:
            top += tl.load(log_weights + k, mask=k < count, other=0.0)
    else:
        member = tl.arange(0, WIDTH)[None, None, :]
        for start in range(0, width, WIDTH):
            at = k[:, :, None].to(tl.int64) * width + start + member
            there = (k < count)[:, :, None] & (start + member < width)
            token = tl.load(members + at, mask=there, other=0)
            value = tl.load(row[:, :, None] + token, mask=inside[:, :, None] & there, other=0.0)
            value *= inv_tau
            if WEIGHTED:
                value += tl.load(log_weights + at, mask=there, other=-float("inf"))
            higher = tl.maximum(top, tl.max(value, 2))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # no inf - inf
            total = total * tl.exp(top - base) + tl.sum(tl.exp(value - base[:, :, None]), 2)
            top = higher
        top += tl.log(tl.where(total == 0.0, 1.0, total))  # -inf where all members are
    to = tl.load(classes + k, mask=k < count, other=0)
    tl.store(out + i.to(tl.int64) * out_stride + to, top, mask=inside)


@triton.jit(do_not_specialize=["rows", "count"])
def make_shares(
    logits,  # (rows, tokens)
    class_logits,  # (rows, classes)
    tokens,  # (count,)
    classes,  # (count,)
    out,  # (rows, count)
    logits_stride,
    class_stride,
    out_stride,
    rows,
    count,
    inv_tau,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """exp(inv_tau logits_v - class_logits_k): what a token has of its class."""
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    v = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside, row = (i < rows) & (v < count), i.to(tl.int64)
    token = tl.load(tokens + v, mask=v < count, other=0)
    own = tl.load(classes + v, mask=v < count, other=0)
    value = tl.load(logits + row * logits_stride + token, mask=inside, other=0.0) * inv_tau
    whole = tl.load(class_logits + row * class_stride + own, mask=inside, other=0.0)
    base = tl.where(whole == -float("inf"), 0.0, whole)  # masked whole: no inf - inf
    tl.store(out + row * out_stride + v, tl.exp(value - base), mask=inside)


@triton.jit(do_not_specialize=["rows", "count"])
def pull_gradient(
    grad,  # (rows, classes)
    shares,  # (rows, tokens that share)
    student_class,  # (count,)
    places,  # (count,) in `shares`; or LONELY, or less where the token has no class
    out,  # (rows, count)
    grad_stride,
    shares_stride,
    out_stride,
    rows,
    count,
    inv_tau,
    LONELY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of class logits in those of tokens."""
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    v = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside, row = (i < rows) & (v < count), i.to(tl.int64)
    own = tl.load(student_class + v, mask=v < count, other=0)
    place = tl.load(places + v, mask=v < count, other=LONELY)
    value = tl.load(grad + row * grad_stride + own, mask=inside, other=0.0) * inv_tau
    share = tl.load(shares + row * shares_stride + place, mask=inside & (place >= 0), other=1.0)
    value = tl.where(place < LONELY, 0.0, value * share)
    tl.store(out + row * out_stride + v, value, mask=inside)


# ---- launches ------------------------------------------------------------------------------------


def class_logits(groups: Sequence[Group], logits: Tensor, inv_tau: float, out: Tensor) -> None:
    """As those of backends/maps.py, which says the shapes."""
    for group in groups:
        width = min(group.width, WIDEST)
        block, count = max(1, MEMBERS // width), len(group.classes)
        launch.run(
            logits.device,
            make_class_logits,
            (-(-len(logits) // ROWS), -(-count // block)),
            logits=logits,
            classes=group.classes,
            members=group.members,
            log_weights=group.log_weights,
            out=out,
            logits_stride=logits.stride(0),
            out_stride=out.stride(0),
            rows=len(logits),
            count=count,
            width=group.width,
            inv_tau=inv_tau,
            WEIGHTED=group.log_weights is not None,
            WIDTH=width,
            ROWS=ROWS,
            BLOCK=block,
            num_warps=WARPS,
        )


def shares(
    shared: Shared, logits: Tensor, inv_tau: float, class_logits: Tensor, out: Tensor
) -> None:
    """As those of backends/maps.py."""
    count = len(shared.tokens)
    if not count:
        return
    launch.run(
        logits.device,
        make_shares,
        (-(-len(logits) // ROWS), -(-count // MEMBERS)),
        logits=logits,
        class_logits=class_logits,
        tokens=shared.tokens,
        classes=shared.classes,
        out=out,
        logits_stride=logits.stride(0),
        class_stride=class_logits.stride(0),
        out_stride=out.stride(0),
        rows=len(logits),
        count=count,
        inv_tau=inv_tau,
        ROWS=ROWS,
        BLOCK=MEMBERS,
        num_warps=WARPS,
    )


def pull(classes: Classes, grad: Tensor, shares: Tensor, inv_tau: float, out: Tensor) -> None:
    """As that of backends/maps.py."""
    count = len(classes.student_class)
    launch.run(
        grad.device,
        pull_gradient,
        (-(-len(grad) // ROWS), -(-count // MEMBERS)),
        grad=grad,
        shares=shares,
        student_class=classes.student_class,
        places=classes.places,
        out=out,
        grad_stride=grad.stride(0),
        shares_stride=shares.stride(0),
        out_stride=out.stride(0),
        rows=len(grad),
        count=count,
        inv_tau=inv_tau,
        ROWS=ROWS,
        LONELY=ALONE,
        BLOCK=MEMBERS,
        num_warps=WARPS,
    )
