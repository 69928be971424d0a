"""The primitives in plain torch, on any device; on a CPU the element-wise steps may be compiled.

`project` makes fp32 logits of a block of rows in a given buffer, `accumulate` the gradients of
hidden states, weight and bias from the gradient of the logits. `steps` takes the element-wise steps
between them (tiles.py), in tiles of a few rows, so that temporaries stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dudi_kernels.backends import native
from dudi_kernels.backends.native import gemm
from dudi_kernels.divergences import FLOOR, Measure
from dudi_kernels.plan import BLOCK, Packing
from dudi_kernels.sweep import Gradients, Side
from dudi_kernels.tiles import (
    STUDENT_POLE,
    TEACHER_POLE,
    RowState,
    Setting,
    Steps,
    Tile,
    helpers,
    smooth_mask,
)

MM_RETURNS_FP32 = "dtype" in torch.ops.aten.mm.overloads()  # torch >= 2.8


# ---- GEMMs ---------------------------------------------------------------------------------------


def _gemm_dtype(hidden: Tensor, backward: bool) -> torch.dtype:
    """Half precision only where a GEMM of it returns fp32; its gradients only in bf16."""
    native_mm = hidden.is_cuda and torch.version.hip is None and MM_RETURNS_FP32
    half = torch.bfloat16 if backward else hidden.dtype  # fp16 gradients would underflow
    return hidden.dtype if native_mm and hidden.dtype == half else torch.float32


def _blocks(size: int, whole: bool) -> Iterator[slice]:
    """The vocabulary, in blocks where each needs a converted copy."""
    step = size if whole else BLOCK
    return (slice(i, min(i + step, size)) for i in range(0, size, max(step, 1)))


def _mm(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """a @ b into fp32 `out`, or added to it."""
    if a.dtype == torch.float32:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    product = torch.mm(a, b, out_dtype=torch.float32)
    if add:
        out.add_(product)
    else:
        out.copy_(product)


def packing(
    device: torch.device, widths: tuple[int, ...], dtypes: set[torch.dtype]
) -> Packing | None:
    """What GEMMs that need no converted copies hold; None: there are none."""
    if not gemm.serves(device, *dtypes):
        return None
    half = torch.float32 not in dtypes
    return lambda rows, columns: max(gemm.workspace(rows, k, columns, half) for k in widths)


def project(side: Side, out: Tensor) -> Tensor:  # (R, V) fp32
    """Logits of a side into `out`, in fp32 whatever the inputs are."""
    head = side.head
    split = gemm.takes(side.hidden, head.weight, out)
    if split:
        gemm.project(side.hidden, head.weight, out)
    dtype = _gemm_dtype(side.hidden, backward=False)
    rows = side.hidden if split else side.hidden.to(dtype)
    for block in _blocks(len(head.weight), dtype == head.weight.dtype == torch.float32):
        if not split:
            _mm(rows, head.weight[block].to(dtype).t(), out[:, block], add=False)
        if head.lora is not None and side.low is not None:
            _mm(side.low, head.lora.b[block].float().t(), out[:, block], add=True)
    if head.bias is not None:
        out.add_(head.bias)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.scale != 1.0:
        out.mul_(head.scale)
    return out


def accumulate(
    grad: Tensor,  # (R, V) fp32 gradient of the raw logits
    side: Side,
    sums: Gradients,  # added to, where they are wanted
    add_weight: bool,  # or write the weight's for the first time
) -> None:
    """The GEMMs of the backward pass, and the bias."""
    head = side.head
    dtype = _gemm_dtype(side.hidden, backward=True)
    whole = dtype == head.weight.dtype == torch.float32
    split = gemm.takes(grad, side.hidden, head.weight)
    split_hidden = split and (len(grad) >= gemm.FEW_ROWS or not whole)
    if split_hidden and sums.hidden is not None:
        gemm.hidden_gradient(grad, head.weight, sums.hidden)
    if split and sums.weight is not None:
        gemm.weight_gradient(grad, side.hidden, sums.weight, add_weight)
    rows = side.hidden if split else side.hidden.to(dtype)
    for block in _blocks(len(head.weight), whole):
        part = grad[:, block]
        own = part if split else part.to(dtype)
        if sums.hidden is not None and not split_hidden:
            _mm(own, head.weight[block].to(dtype), sums.hidden, add=True)
        if sums.weight is not None and not split:
            _mm(own.t(), rows, sums.weight[block], add=add_weight)
        if sums.low is not None and head.lora is not None:
            _mm(part, head.lora.b[block].float(), sums.low, add=True)
        if sums.lora_b is not None and side.low is not None:
            _mm(part.t(), side.low, sums.lora_b[block], add=True)
    if sums.bias is not None:
        sums.bias.add_(grad.sum(0))


# ---- element-wise steps --------------------------------------------------------------------------


def needs_temporaries(device: torch.device, measures: list[Measure | None]) -> bool:
    """Whether `steps` holds temporaries of a tile; the compiled steps don't."""
    return not native.takes(device, measures)


def steps(setting: Setting, state: RowState, tile: Tile, wanted: Steps) -> None:
    """Take the wanted steps over a tile, in place."""
    if native.takes(tile.student.device, [tile.measure]):
        native.steps(setting, state, tile, wanted)
        return
    rows = len(tile.student)
    for start in range(0, rows, setting.tile_rows):
        local = slice(start, min(start + setting.tile_rows, rows))
        part = tile._replace(
            student=tile.student[local],
            teacher=None if tile.teacher is None else tile.teacher[local],
            first_row=tile.first_row + start,
        )
        own = slice(part.first_row, part.first_row + len(part.student))
        if wanted.statistics or wanted.teacher_statistics:
            _statistics(setting, state, part, own, wanted)
        if wanted.sums or wanted.gradient:
            _sums_and_gradient(setting, state, part, own, wanted)


def _statistics(setting: Setting, state: RowState, tile: Tile, own: slice, wanted: Steps) -> None:
    sides = []
    if wanted.statistics:
        log_sums = state.log_sum, state.tempered_log_sum
        sides.append((tile.student, setting.inv_tau, *log_sums, state.target))
    if wanted.teacher_statistics:
        assert tile.teacher is not None
        log_sums = state.teacher_log_sum, state.teacher_tempered_log_sum
        sides.append((tile.teacher, setting.teacher_inv_tau, *log_sums, state.teacher_target))
    for logits, inv_tau, log_sum, tempered, target in sides:
        _add_log_sum(log_sum[own], logits)
        if inv_tau == 1.0:
            tempered[own] = log_sum[own]
        else:
            _add_log_sum(tempered[own], logits * inv_tau)
        if setting.targets is not None:
            inside, index = _inside(setting.targets[own] - tile.first_column, logits.shape[1])
            found = logits.gather(1, index)[:, 0]
            target[own] = torch.where(inside, found, target[own])


def _add_log_sum(log_sum: Tensor, logits: Tensor) -> None:
    top = logits.amax(1)
    base = top.masked_fill(top == -torch.inf, 0)  # no inf - inf
    total = (logits - base[:, None]).exp_().sum(1, dtype=log_sum.dtype)
    torch.logaddexp(log_sum, base + total.log(), out=log_sum)


def _inside(local: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block of `width` columns, and (R, 1) safe indices."""
    return (local >= 0) & (local < width), local.clamp(0, width - 1)[:, None]


def _log_probs(logits: Tensor, log_sum: Tensor, inv_tau: float, masked: bool) -> Tensor:
    """Taking the log-sum-exp off in two floats keeps a log-probability as exact as its logit."""
    high = log_sum.float()
    low = (log_sum - high).masked_fill(high.isinf(), 0).float()
    scaled = logits if inv_tau == 1.0 else logits * inv_tau
    values = (scaled - high[:, None]).sub_(low[:, None])
    return values.clamp_(min=FLOOR) if masked else values


def _sums_and_gradient(
    setting: Setting, state: RowState, tile: Tile, own: slice, wanted: Steps
) -> None:
    masked, measure = setting.masked, tile.measure
    lq1 = _log_probs(tile.student, state.log_sum[own], 1.0, masked)
    q1 = lq1.exp()
    if wanted.sums:
        state.entropy[own] -= (q1 * lq1).sum(1)
    q = g = None
    if measure is not None:
        assert tile.teacher is not None
        lp1 = _log_probs(tile.teacher, state.teacher_log_sum[own], 1.0, masked)
        p1 = lp1.exp()
        if wanted.sums:
            state.teacher_entropy[own] -= (p1 * lp1).sum(1)
        q, lq, p, lp = q1, lq1, p1, lp1
        if setting.inv_tau != 1.0 or setting.teacher_inv_tau != 1.0:
            lq = _log_probs(tile.student, state.tempered_log_sum[own], setting.inv_tau, masked)
            lp = _log_probs(
                tile.teacher, state.teacher_tempered_log_sum[own], setting.teacher_inv_tau, masked
            )
            q, p = lq.exp(), lp.exp()
        phi, g = measure.terms(p, lp, q, lq, *helpers(measure, p, lp, q, lq), measure.a, measure.b)
        if wanted.sums:
            state.divergence[own] += phi.sum(1)
            state.g_sum[own] += g.sum(1)
            if masked:
                hits = ((lq <= FLOOR) & (p > 0)).any(1) * STUDENT_POLE
                hits += ((lp <= FLOOR) & (q > 0)).any(1) * TEACHER_POLE
                state.poles[own] |= hits.int()
    if wanted.gradient:
        _gradient(setting, state, tile, own, lq1, q1, q, g)


def _gradient(
    setting: Setting,
    state: RowState,
    tile: Tile,
    own: slice,
    lq1: Tensor,
    q1: Tensor,
    q: Tensor | None,  # at the divergence's temperature
    g: Tensor | None,
) -> None:
    """w (g - q sum g) + c (onehot - q1) - e q1 (log q1 + H), through softcap and scale."""
    logits = tile.student
    slope = _slope(logits, setting)
    if q is None or g is None:
        logits.zero_()
    else:
        assert tile.measure is not None
        weight, g_sum = state.weight[own] * setting.inv_tau, state.g_sum[own]
        if setting.masked:
            pole = (state.poles[own] & smooth_mask(tile.measure)) != 0
            weight, g_sum = weight.masked_fill(pole, 0), g_sum.masked_fill(pole, 0)  # no 0 * inf
        torch.addcmul(g, q, g_sum[:, None], value=-1, out=logits)
        logits.mul_(weight[:, None])
    if state.coefficient is not None:
        coefficient = state.coefficient[own, None]
        logits.addcmul_(q1, coefficient, value=-1)
        if setting.targets is not None:
            inside, index = _inside(setting.targets[own] - tile.first_column, logits.shape[1])
            logits.scatter_add_(1, index, coefficient * inside[:, None])
    if state.entropy_weight is not None:
        surprise = lq1.add_(state.entropy[own, None]).mul_(q1)
        logits.addcmul_(surprise, state.entropy_weight[own, None], value=-1)
    if slope is not None:
        logits.mul_(slope)


def _slope(logits: Tensor, setting: Setting) -> Tensor | float | None:
    """d logit / d raw logit through softcap and scale."""
    if setting.softcap is None:
        return setting.scale if setting.scale != 1.0 else None
    capped = logits / (setting.softcap * setting.scale)
    return capped.square_().neg_().add_(1).mul_(setting.scale)
