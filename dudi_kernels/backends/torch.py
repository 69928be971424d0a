"""The primitives in plain torch, on any device; on a CPU the element-wise steps may be compiled.

`steps` takes the element-wise steps between the GEMMs (gemms.py) in tiles of a few rows, so that
temporaries stay in cache; tiles.py tells what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from dudi_kernels.adaptive import mix
from dudi_kernels.backends import maps, native
from dudi_kernels.backends.gemms import accumulate, packing, project
from dudi_kernels.classes import Classes, Group, Shared
from dudi_kernels.divergences import FLOOR, Measure
from dudi_kernels.plan import FP32
from dudi_kernels.recompute import Stream
from dudi_kernels.tiles import (
    STUDENT_POLE,
    TEACHER_POLE,
    RowState,
    Setting,
    Steps,
    Tile,
    helpers,
    log_probs,
    slope,
    smooth_mask,
)

__all__ = [
    "Stream",
    "accumulate",
    "balance",
    "class_logits",
    "fuses",
    "needs_temporaries",
    "packing",
    "project",
    "pull",
    "shares",
    "steps",
    "stream_bytes",
]

# ---- maps between tokens and classes -------------------------------------------------------------


def _maps(device: torch.device) -> ModuleType:
    """Compiled, where the steps are."""
    if not native.takes(device, []):
        return maps
    import dudi_kernels.backends.native.maps as compiled

    return compiled


def class_logits(groups: Sequence[Group], logits: Tensor, inv_tau: float, out: Tensor) -> None:
    """log sum_u M_uk exp(inv_tau logits_u) of each class, (R, U) -> (R, K)."""
    _maps(logits.device).class_logits(groups, logits, inv_tau, out)


def shares(
    shared: Shared, logits: Tensor, inv_tau: float, class_logits: Tensor, out: Tensor
) -> None:
    """exp(inv_tau logits_v - class_logits_k): what a token has of its class, (R, V) -> (R, n)."""
    _maps(logits.device).shares(shared, logits, inv_tau, class_logits, out)


def pull(classes: Classes, grad: Tensor, shares: Tensor, inv_tau: float, out: Tensor) -> None:
    """The gradient of the class logits in those of the tokens, (R, K) -> (R, V)."""
    _maps(grad.device).pull(classes, grad, shares, inv_tau, out)


# ---- element-wise steps --------------------------------------------------------------------------


def needs_temporaries(device: torch.device, measures: list[Measure | None]) -> bool:
    """Whether `steps` holds temporaries of a tile; the compiled steps don't, but for the likelier
    tokens of one row a thread where a divergence is adaptive."""
    return not native.takes(device, measures)


def fuses(device: torch.device) -> bool:
    """Whether projections are made in the kernels, so that *recompute* stores no logits."""
    return False


def balance(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs of a projection in a kernel that take as long as a byte: there is none."""
    return 0.0


def stream_bytes(
    device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int, sides: int
) -> tuple[int, int]:
    """What `Stream` holds for each row and column of a block, and in the forward pass besides."""
    return sides * FP32, 0


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
        own = part.own
        if wanted.statistics or wanted.teacher_statistics:
            _statistics(setting, state, part, own, wanted)
        if wanted.mixture:
            mix(setting, state, part)
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


def _sums_and_gradient(
    setting: Setting, state: RowState, tile: Tile, own: slice, wanted: Steps
) -> None:
    masked, measure = setting.masked, tile.measure
    lq1 = log_probs(tile.student, state.log_sum[own], 1.0, masked)
    q1 = lq1.exp()
    if wanted.sums:
        state.entropy[own] -= (q1 * lq1).sum(1)
    q = g = None
    if measure is not None:
        assert tile.teacher is not None
        lp1 = log_probs(tile.teacher, state.teacher_log_sum[own], 1.0, masked)
        p1 = lp1.exp()
        if wanted.sums:
            state.teacher_entropy[own] -= (p1 * lp1).sum(1)
        q, lq, p, lp = q1, lq1, p1, lp1
        if setting.inv_tau != 1.0 or setting.teacher_inv_tau != 1.0:
            lq = log_probs(tile.student, state.tempered_log_sum[own], setting.inv_tau, masked)
            lp = log_probs(
                tile.teacher, state.teacher_tempered_log_sum[own], setting.teacher_inv_tau, masked
            )
            q, p = lq.exp(), lp.exp()
        a = measure.a if state.mixture is None or not measure.adaptive else state.mixture[own, None]
        phi, g = measure.terms(p, lp, q, lq, *helpers(measure, p, lp, q, lq), a, measure.b)
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
    factor = slope(logits, setting)
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
    if factor is not None:
        logits.mul_(factor)
