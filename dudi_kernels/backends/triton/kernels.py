"""The kernels: statistics, sums and gradient of tiles of logits; and partial rows put together.

A tile of logits comes from a buffer that a GEMM has filled (*retain*), or is projected right here
from hidden states and head (FUSED, *recompute*: no logit is ever stored). Programs split rows and,
where rows are few, the vocabulary: partial results of the splits are written apart and combined in
a fixed order, so that results are the same bit for bit from run to run.

Every kernel takes the two sides in the same order; launch.py makes the arguments.
"""

# Arguments stand together by kind.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from dudi_kernels.backends.triton.elements import (
    FLOOR,
    INTERPRETED,
    NOTHING,
    gap_of,
    log_prob_of,
    minus_expm1,
    online,
    split_float,
    tanh,
    terms_of,
)

SPLITS = tl.constexpr(16)  # whose partial results are read at once
UPCAST = tl.constexpr(INTERPRETED)  # products of bf16 are wrong there; a CPU's GEMMs are in fp32

# Rows of the partial results of `statistics`, for each side.
TOP = tl.constexpr(0)
TOTAL = tl.constexpr(1)
FIRST = tl.constexpr(2)  # sum of exp(x - top) (x - top)
TEMPERED_TOP = tl.constexpr(3)
TEMPERED_TOTAL = tl.constexpr(4)
CROSS = tl.constexpr(5)  # sum of exp (teacher - student), both tempered
TARGET = tl.constexpr(6)
SIDE_FIELDS = tl.constexpr(7)
POLES = tl.constexpr(14)  # after both sides'
STATISTICS_FIELDS = 15

# Of the tiles' masses that `statistics` keeps: log-sum-exps of a row in a tile, and a gap.
MASS = tl.constexpr(0)  # the student's
TEMPERED_MASS = tl.constexpr(1)
TEACHER_MASS = tl.constexpr(2)  # tempered
MASS_GAP = tl.constexpr(3)  # the largest student - teacher, both tempered
MASS_FIELDS = 4

# Of `sums`.
DIVERGENCE = tl.constexpr(0)
G_SUM = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
TEACHER_ENTROPY = tl.constexpr(3)
SUMS_POLES = tl.constexpr(4)
SUMS_FIELDS = 5


# ---- tiles of logits -----------------------------------------------------------------------------


@triton.jit
def product(
    a, b, a_stride, b_stride, row, column, rows, columns, width, acc, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr = None,  # None: those of the launch
):
    """acc + a[row : row + BLOCK_N] @ b[column : column + BLOCK_V]^T."""
    if DESCRIPTORS:
        for k in range(0, width, BLOCK_D):
            left = a.load([row, k])
            right = b.load([column, k])
            if UPCAST:
                left = left.to(tl.float32)
            right = right.to(left.dtype)
            acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    else:
        i = row + tl.arange(0, BLOCK_N)
        j = column + tl.arange(0, BLOCK_V)
        d = tl.arange(0, BLOCK_D)
        left_at = a + i.to(tl.int64)[:, None] * a_stride + d[None, :]
        right_at = b + j.to(tl.int64)[None, :] * b_stride + d[:, None]
        for k in tl.range(0, width, BLOCK_D, num_stages=STAGES):
            inside = d < width - k
            left = tl.load(left_at, mask=(i < rows)[:, None] & inside[None, :], other=0.0)
            right = tl.load(right_at, mask=(j < columns)[None, :] & inside[:, None], other=0.0)
            if UPCAST:
                left = left.to(tl.float32)
            right = right.to(left.dtype)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
            left_at += BLOCK_D
            right_at += BLOCK_D
    return acc


@triton.jit
def side_tile(
    logits, hidden, weight, bias, low, lora, logits_stride, hidden_stride, weight_stride,
    lora_stride, row, column, rows, columns, width, rank, softcap, scale, FUSED: tl.constexpr,
    BIAS: tl.constexpr, LORA: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """A side's logits, fp32: read, or made here."""
    i = row + tl.arange(0, BLOCK_N)
    j = column + tl.arange(0, BLOCK_V)
    if FUSED:
        tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        tile = product(
            hidden, weight, hidden_stride, weight_stride, row, column, rows, columns, width, tile,
            DESCRIPTORS, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )
        if LORA:
            tile = product(
                low, lora, rank, lora_stride, row, column, rows, columns, rank, tile, False,
                PRECISION, BLOCK_N, BLOCK_V, 16, 1,
            )
        if BIAS:
            own = tl.load(bias + j, mask=j < columns, other=0.0).to(tl.float32)[None, :]
            tile += own
        if SOFTCAP:
            tile = tanh(tile / softcap) * softcap
            if BIAS:  # a mask holds past the cap
                tile = tl.where(own == -float("inf"), own, tile)
        tile *= scale
    else:
        at = logits + i.to(tl.int64)[:, None] * logits_stride + j[None, :]
        tile = tl.load(at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return tile


@triton.jit
def floored(tile, column, columns, MASKED: tl.constexpr, BLOCK_V: tl.constexpr):
    """FLOOR for columns that don't exist or are masked."""
    j = column + tl.arange(0, BLOCK_V)
    tile = tl.where((j < columns)[None, :], tile, FLOOR)
    return tl.maximum(tile, FLOOR) if MASKED else tile


@triton.jit
def at_temperature(tile, inv_tau, TEMPERED: tl.constexpr):
    return tl.where(tile > FLOOR, tile * inv_tau, FLOOR) if TEMPERED else tile


@triton.jit
def poles_of(learner, guide, columns_inside):
    """Whether (1) the student masks a token that the teacher doesn't, (2) the other way round."""
    student = tl.max(((learner <= FLOOR) & (guide > FLOOR) & columns_inside).to(tl.int32), 1)
    teacher = tl.max(((guide <= FLOOR) & (learner > FLOOR) & columns_inside).to(tl.int32), 1)
    return student + 2 * teacher


# ---- statistics ----------------------------------------------------------------------------------


@triton.jit
def store_side(
    partials, at, field_stride, inside, top, total, first, tempered_top, tempered_total, cross,
    target, CROSSED: tl.constexpr, TARGETS: tl.constexpr, TEMPERED: tl.constexpr,
):
    tl.store(partials + at + TOP * field_stride, top, mask=inside)
    tl.store(partials + at + TOTAL * field_stride, total, mask=inside)
    tl.store(partials + at + FIRST * field_stride, first, mask=inside)
    if TEMPERED:
        tl.store(partials + at + TEMPERED_TOP * field_stride, tempered_top, mask=inside)
        tl.store(partials + at + TEMPERED_TOTAL * field_stride, tempered_total, mask=inside)
    if CROSSED:
        tl.store(partials + at + CROSS * field_stride, cross, mask=inside)
    if TARGETS:
        tl.store(partials + at + TARGET * field_stride, target, mask=inside)


@triton.jit
def store_mass(masses, FIELD: tl.constexpr, tile, all_tiles, rows, i, value):
    wide = tl.zeros_like(i).to(tl.int64) + FIELD * all_tiles + tile
    tl.store(masses + wide * rows + i, value, mask=i < rows)


@triton.jit(do_not_specialize=["rows", "first_row", "tiles"])
def statistics(
    s_logits, s_hidden, s_weight, s_bias, s_low, s_lora, t_logits, t_hidden, t_weight, t_bias,
    t_low, t_lora, targets,
    partials,  # (STATISTICS_FIELDS, splits, rows)
    masses,  # (MASS_FIELDS, tiles of the vocabulary, rows)
    s_logits_stride, s_hidden_stride, s_weight_stride, s_lora_stride, t_logits_stride,
    t_hidden_stride, t_weight_stride, t_lora_stride, rows, first_row, columns, s_width, t_width,
    s_rank, t_rank,
    tiles,  # of a split
    s_softcap, s_scale, s_inv_tau, t_softcap, t_scale, t_inv_tau,
    STUDENT: tl.constexpr,  # which sides are wanted
    TEACHER: tl.constexpr,
    CHAIN: tl.constexpr,  # 1: forward KL, 2: reverse KL, from the same pass
    MASSES: tl.constexpr, GAPS: tl.constexpr,
    TARGETS: tl.constexpr, MASKED: tl.constexpr, S_TEMPERED: tl.constexpr,
    T_TEMPERED: tl.constexpr, FUSED: tl.constexpr, S_BIAS: tl.constexpr, S_LORA: tl.constexpr,
    S_SOFTCAP: tl.constexpr, T_BIAS: tl.constexpr, T_LORA: tl.constexpr, T_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Online log-sum-exps and moments of both sides, target logits, and a KL's cross term."""
    row = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    i = row + tl.arange(0, BLOCK_N)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    nothing = zero + FLOOR
    s_top, s_tempered_top, t_top, t_tempered_top = nothing, nothing, nothing, nothing
    s_total, s_tempered_total, s_first, s_cross, s_target = zero, zero, zero, zero, zero
    t_total, t_tempered_total, t_first, t_cross, t_target = zero, zero, zero, zero, zero
    unused = zero
    poles = tl.zeros((BLOCK_N,), tl.int32)
    if TARGETS:
        own = tl.load(targets + first_row + i, mask=i < rows, other=-1).to(tl.int32)[:, None]
    start = split * tiles * BLOCK_V
    all_tiles = tl.cdiv(columns, BLOCK_V)
    for column in range(start, tl.minimum(start + tiles * BLOCK_V, columns), BLOCK_V):
        tile = column // BLOCK_V
        j = column + tl.arange(0, BLOCK_V)[None, :]
        if TEACHER:
            raw = side_tile(
                t_logits, t_hidden, t_weight, t_bias, t_low, t_lora, t_logits_stride,
                t_hidden_stride, t_weight_stride, t_lora_stride, row, column, rows, columns,
                t_width, t_rank, t_softcap, t_scale, FUSED, T_BIAS, T_LORA, T_SOFTCAP, DESCRIPTORS,
                PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
            )
            if TARGETS:
                t_target += tl.sum(tl.where(j == own, raw, 0.0), 1)
            guide = floored(raw, column, columns, MASKED, BLOCK_V)
        if STUDENT:
            raw = side_tile(
                s_logits, s_hidden, s_weight, s_bias, s_low, s_lora, s_logits_stride,
                s_hidden_stride, s_weight_stride, s_lora_stride, row, column, rows, columns,
                s_width, s_rank, s_softcap, s_scale, FUSED, S_BIAS, S_LORA, S_SOFTCAP, DESCRIPTORS,
                PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
            )
            if TARGETS:
                s_target += tl.sum(tl.where(j == own, raw, 0.0), 1)
            learner = floored(raw, column, columns, MASKED, BLOCK_V)
            s_top, s_total, s_first, s_shrink, s_exp, s_own = online(
                s_top, s_total, s_first, learner, MASKED
            )
            if MASSES:
                store_mass(masses, MASS, tile, all_tiles, rows, i, s_top + tl.log(s_own))
            learner = at_temperature(learner, s_inv_tau, S_TEMPERED)
            if S_TEMPERED:
                s_tempered_top, s_tempered_total, unused, s_shrink, s_exp, s_own = online(
                    s_tempered_top, s_tempered_total, unused, learner, MASKED
                )
                if MASSES:
                    mass = s_tempered_top + tl.log(s_own)
                    store_mass(masses, TEMPERED_MASS, tile, all_tiles, rows, i, mass)
        if TEACHER:
            t_top, t_total, t_first, t_shrink, t_exp, t_own = online(
                t_top, t_total, t_first, guide, MASKED
            )
            guide = at_temperature(guide, t_inv_tau, T_TEMPERED)
            if T_TEMPERED:
                t_tempered_top, t_tempered_total, unused, t_shrink, t_exp, t_own = online(
                    t_tempered_top, t_tempered_total, unused, guide, MASKED
                )
            if MASSES:
                mass = (t_tempered_top if T_TEMPERED else t_top) + tl.log(t_own)
                store_mass(masses, TEACHER_MASS, tile, all_tiles, rows, i, mass)
            if GAPS:
                gap = tl.max(tl.where(learner > FLOOR, learner - guide, FLOOR), 1)
                store_mass(masses, MASS_GAP, tile, all_tiles, rows, i, gap)
        if CHAIN == 1:
            cross = tl.sum(t_exp * gap_of(guide, learner, MASKED), 1)
            t_cross = t_cross * t_shrink + cross
        if CHAIN == 2:
            cross = tl.sum(s_exp * gap_of(guide, learner, MASKED), 1)
            s_cross = s_cross * s_shrink + cross
        if MASKED and CHAIN != 0:
            poles |= poles_of(learner, guide, j < columns)
    field_stride = tl.num_programs(1).to(tl.int64) * rows
    at = split.to(tl.int64) * rows + i
    if STUDENT:
        store_side(
            partials, at, field_stride, i < rows, s_top, s_total, s_first, s_tempered_top,
            s_tempered_total, s_cross, s_target, CHAIN == 2, TARGETS, S_TEMPERED,
        )
    if TEACHER:
        store_side(
            partials + SIDE_FIELDS * field_stride, at, field_stride, i < rows, t_top, t_total,
            t_first, t_tempered_top, t_tempered_total, t_cross, t_target, CHAIN == 1, TARGETS,
            T_TEMPERED,
        )
    if MASKED and CHAIN != 0:
        to = partials + POLES * field_stride + at
        tl.store(to, poles.to(tl.float32), mask=i < rows)


# ---- partial rows put together -------------------------------------------------------------------


@triton.jit
def of_splits(values, FIELD: tl.constexpr, first, rows, splits, i, inside, nothing):
    """A field of SPLITS splits from `first` on, (SPLITS, rows); `nothing` of those that don't
    exist."""
    split = first + tl.arange(0, SPLITS)[:, None]
    at = (splits * FIELD + split).to(tl.int64) * rows + i[None, :]
    return tl.load(values + at, mask=inside[None, :] & (split < splits), other=nothing)


@triton.jit
def added(values, FIELD: tl.constexpr, rows, splits, i, inside):
    """The sum of a field over the splits, in a fixed order, in float64."""
    total = tl.zeros(i.shape, tl.float64)
    for first in range(0, splits, SPLITS):
        own = of_splits(values, FIELD, first, rows, splits, i, inside, 0.0)
        total += tl.sum(own.to(tl.float64), 0)
    return total


@triton.jit
def whole_log_sum(partials, TOP_FIELD: tl.constexpr, rows, splits, i, inside):
    """The maximum, and the sum of exp(x - maximum) over all splits, in float64."""
    top = tl.zeros(i.shape, tl.float32) + FLOOR
    for first in range(0, splits, SPLITS):
        own = of_splits(partials, TOP_FIELD, first, rows, splits, i, inside, FLOOR)
        top = tl.maximum(top, tl.max(own, 0))
    total = tl.zeros(i.shape, tl.float64)
    for first in range(0, splits, SPLITS):
        own = of_splits(partials, TOP_FIELD, first, rows, splits, i, inside, FLOOR)
        shrink = tl.exp(tl.maximum(own - top[None, :], NOTHING))
        own = of_splits(partials, TOP_FIELD + 1, first, rows, splits, i, inside, 0.0)
        total += tl.sum((own * shrink).to(tl.float64), 0)
    return top, tl.where(inside, total, 1.0)  # has a logarithm


@triton.jit
def moment(
    partials, TOP_FIELD: tl.constexpr, FIELD: tl.constexpr, MOVED: tl.constexpr, top, rows, splits,
    i, inside,
):
    """The sum over the splits of a field that belongs to a log-sum-exp, at the maximum of all;
    a first moment is MOVED from the maximum of its split, too."""
    sums = tl.zeros(i.shape, tl.float64)
    for first in range(0, splits, SPLITS):
        own = of_splits(partials, TOP_FIELD, first, rows, splits, i, inside, FLOOR)
        difference = tl.maximum(own - top[None, :], NOTHING)
        value = of_splits(partials, FIELD, first, rows, splits, i, inside, 0.0)
        if MOVED:
            own = of_splits(partials, TOP_FIELD + 1, first, rows, splits, i, inside, 0.0)
            value += own * difference
        sums += tl.sum((value * tl.exp(difference)).to(tl.float64), 0)
    return sums


@triton.jit
def cross_of(partials, top, rows, splits, i, inside, TEMPERED: tl.constexpr):
    """A KL's cross term, at the temperature of its side."""
    FIELD: tl.constexpr = TEMPERED_TOP if TEMPERED else TOP
    return moment(partials, FIELD, CROSS, False, top, rows, splits, i, inside)


@triton.jit
def stored_log_sum(log_sum, top, total, at, inside):
    """Added to what earlier columns gave."""
    value = tl.where(top <= FLOOR, -float("inf"), top.to(tl.float64) + tl.log(total))
    older = tl.load(log_sum + at, mask=inside, other=0.0).to(tl.float64)
    larger = tl.maximum(older, value)
    other = tl.minimum(older, value)
    apart = tl.where(other == -float("inf"), 0.0, tl.exp(other - larger))
    value = larger + tl.where(apart > 0, tl.log(1 + apart), 0.0)
    tl.store(log_sum + at, value.to(log_sum.dtype.element_ty), mask=inside)
    return value


@triton.jit(do_not_specialize=["rows", "first_row", "splits"])
def combine_statistics(
    partials, s_log_sum, s_tempered_log_sum, s_target, s_entropy, t_log_sum,
    t_tempered_log_sum, t_target, t_entropy, divergence, g_sum, poles, rows, first_row, splits,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    MOMENTS: tl.constexpr,  # entropies, and with a CHAIN the divergence, of whole rows
    CHAIN: tl.constexpr,
    OFFSET: tl.constexpr,  # sum(g) = OFFSET + SLOPE * divergence
    SLOPE: tl.constexpr, TARGETS: tl.constexpr, MASKED: tl.constexpr, S_TEMPERED: tl.constexpr,
    T_TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):
    """From the splits' partial results to the state of the rows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    at = first_row + i
    others = partials + (splits * SIDE_FIELDS).to(tl.int64) * rows
    if STUDENT:
        s_top, s_total, s_value = combine_side(
            partials, s_log_sum, s_tempered_log_sum, s_target, s_entropy, rows, splits, i, at,
            inside, MOMENTS, TARGETS, S_TEMPERED,
        )
    if TEACHER:
        t_top, t_total, t_value = combine_side(
            others, t_log_sum, t_tempered_log_sum, t_target, t_entropy, rows, splits, i, at,
            inside, MOMENTS, TARGETS, T_TEMPERED,
        )
    if CHAIN != 0:
        if CHAIN == 1:
            cross = cross_of(others, t_top, rows, splits, i, inside, T_TEMPERED)
            value = cross / t_total - t_value + s_value
        else:
            cross = cross_of(partials, s_top, rows, splits, i, inside, S_TEMPERED)
            value = t_value - s_value - cross / s_total
        value = value.to(tl.float32)
        tl.store(divergence + at, value, mask=inside)
        tl.store(g_sum + at, OFFSET + (SLOPE * value if SLOPE != 0 else 0 * value), mask=inside)
        if MASKED:
            store_poles(poles, partials, POLES, rows, splits, i, at, inside)


@triton.jit
def combine_side(
    partials, log_sum, tempered_log_sum, target, entropy, rows, splits, i, at, inside,
    MOMENTS: tl.constexpr, TARGETS: tl.constexpr, TEMPERED: tl.constexpr,
):
    """One side's; the maximum, sum and log-sum-exp at its temperature."""
    top, total = whole_log_sum(partials, TOP, rows, splits, i, inside)
    stored_log_sum(log_sum, top, total, at, inside)
    if MOMENTS:
        first = moment(partials, TOP, FIRST, True, top, rows, splits, i, inside)
        value = tl.log(total) - first / total
        tl.store(entropy + at, value.to(tl.float32), mask=inside)
    if TARGETS:
        value = added(partials, TARGET, rows, splits, i, inside)
        tl.store(target + at, value.to(tl.float32), mask=inside)
    if TEMPERED:
        top, total = whole_log_sum(partials, TEMPERED_TOP, rows, splits, i, inside)
    return top, total, stored_log_sum(tempered_log_sum, top, total, at, inside)


@triton.jit
def store_poles(poles, values, FIELD: tl.constexpr, rows, splits, i, at, inside):
    bits = tl.load(poles + at, mask=inside, other=0)
    for first in range(0, splits, SPLITS):
        own = of_splits(values, FIELD, first, rows, splits, i, inside, 0.0).to(tl.int32)
        bits |= tl.max(own & 1, 0) | tl.max(own & 2, 0)
    tl.store(poles + at, bits, mask=inside)


# ---- sums ----------------------------------------------------------------------------------------


@triton.jit
def row_log_sum(log_sum, at, inside):
    """Rows that are not there have no probability anywhere."""
    return split_float(tl.load(log_sum + at, mask=inside, other=float("inf")))


@triton.jit(do_not_specialize=["rows", "first_row", "tiles"])
def sums(
    s_logits, s_hidden, s_weight, s_bias, s_low, s_lora, t_logits, t_hidden, t_weight, t_bias,
    t_low, t_lora, s_log_sum, s_tempered_log_sum, t_log_sum, t_tempered_log_sum, mixture,
    partials,  # (SUMS_FIELDS, splits, rows)
    s_logits_stride, s_hidden_stride, s_weight_stride, s_lora_stride, t_logits_stride,
    t_hidden_stride, t_weight_stride, t_lora_stride, rows, first_row, columns, s_width, t_width,
    s_rank, t_rank,
    tiles,  # of a split
    s_softcap, s_scale, s_inv_tau, t_softcap, t_scale, t_inv_tau, a, b,
    TERMS: tl.constexpr,  # None: the student's entropy alone
    HELPERS: tl.constexpr,
    MIXTURE: tl.constexpr,  # whether each row has its own `a`
    MASKED: tl.constexpr, S_TEMPERED: tl.constexpr, T_TEMPERED: tl.constexpr, FUSED: tl.constexpr,
    S_BIAS: tl.constexpr, S_LORA: tl.constexpr, S_SOFTCAP: tl.constexpr, T_BIAS: tl.constexpr,
    T_LORA: tl.constexpr, T_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Divergence, sum of g and entropies, from the log-sum-exps of whole rows."""
    row = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    i = row + tl.arange(0, BLOCK_N)[:, None]
    inside = i < rows
    zero = tl.zeros((BLOCK_N,), tl.float32)
    divergence, g_sum, entropy, t_entropy = zero, zero, zero, zero
    poles = tl.zeros((BLOCK_N,), tl.int32)
    s_high, s_low_part = row_log_sum(s_log_sum, first_row + i, inside)
    if TERMS is not None:
        t_high, t_low_part = row_log_sum(t_log_sum, first_row + i, inside)
    if S_TEMPERED or T_TEMPERED:
        sh, sl = row_log_sum(s_tempered_log_sum, first_row + i, inside)
        th, tl_ = row_log_sum(t_tempered_log_sum, first_row + i, inside)
    if MIXTURE:
        a = tl.load(mixture + first_row + i, mask=inside, other=0.0)
    start = split * tiles * BLOCK_V
    for column in range(start, tl.minimum(start + tiles * BLOCK_V, columns), BLOCK_V):
        there = (column + tl.arange(0, BLOCK_V) < columns)[None, :]
        if TERMS is not None:
            raw = side_tile(
                t_logits, t_hidden, t_weight, t_bias, t_low, t_lora, t_logits_stride,
                t_hidden_stride, t_weight_stride, t_lora_stride, row, column, rows, columns,
                t_width, t_rank, t_softcap, t_scale, FUSED, T_BIAS, T_LORA, T_SOFTCAP, DESCRIPTORS,
                PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
            )
            guide = floored(raw, column, columns, MASKED, BLOCK_V)
            lp = log_prob_of(guide, t_high, t_low_part)
            p = tl.exp(lp)
            t_entropy -= tl.sum(p * lp, 1)
        raw = side_tile(
            s_logits, s_hidden, s_weight, s_bias, s_low, s_lora, s_logits_stride, s_hidden_stride,
            s_weight_stride, s_lora_stride, row, column, rows, columns, s_width, s_rank, s_softcap,
            s_scale, FUSED, S_BIAS, S_LORA, S_SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, BLOCK_V,
            BLOCK_D,
        )
        learner = floored(raw, column, columns, MASKED, BLOCK_V)
        lq = log_prob_of(learner, s_high, s_low_part)
        q = tl.exp(lq)
        entropy -= tl.sum(q * lq, 1)
        if TERMS is not None:
            if S_TEMPERED or T_TEMPERED:
                lq = log_prob_of(at_temperature(learner, s_inv_tau, True), sh, sl)
                lp = log_prob_of(at_temperature(guide, t_inv_tau, True), th, tl_)
                q, p = tl.exp(lq), tl.exp(lp)
            phi, g = terms_of(p, lp, q, lq, a, b, TERMS, HELPERS)
            divergence += tl.sum(tl.where(there, phi, 0.0), 1)
            g_sum += tl.sum(tl.where(there, g, 0.0), 1)
            if MASKED:
                student = tl.max(((lq <= FLOOR) & (p > 0) & there).to(tl.int32), 1)
                teacher = tl.max(((lp <= FLOOR) & (q > 0) & there).to(tl.int32), 1)
                poles |= student + 2 * teacher
    field_stride = tl.num_programs(1).to(tl.int64) * rows
    i = row + tl.arange(0, BLOCK_N)
    inside = i < rows
    at = partials + split.to(tl.int64) * rows + i
    tl.store(at + ENTROPY * field_stride, entropy, mask=inside)
    if TERMS is not None:
        tl.store(at + DIVERGENCE * field_stride, divergence, mask=inside)
        tl.store(at + G_SUM * field_stride, g_sum, mask=inside)
        tl.store(at + TEACHER_ENTROPY * field_stride, t_entropy, mask=inside)
        if MASKED:
            tl.store(at + SUMS_POLES * field_stride, poles.to(tl.float32), mask=inside)


@triton.jit
def add_to(target, values, FIELD: tl.constexpr, rows, splits, i, at, inside):
    value = added(values, FIELD, rows, splits, i, inside)
    older = tl.load(target + at, mask=inside, other=0.0)
    tl.store(target + at, older + value.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["rows", "first_row", "splits"])
def combine_sums(
    partials, divergence, g_sum, s_entropy, t_entropy, poles, rows, first_row, splits,
    TAUGHT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):
    """From the splits' sums to the state of the rows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    at = first_row + i
    add_to(s_entropy, partials, ENTROPY, rows, splits, i, at, inside)
    if TAUGHT:
        add_to(divergence, partials, DIVERGENCE, rows, splits, i, at, inside)
        add_to(g_sum, partials, G_SUM, rows, splits, i, at, inside)
        add_to(t_entropy, partials, TEACHER_ENTROPY, rows, splits, i, at, inside)
        if MASKED:
            store_poles(poles, partials, SUMS_POLES, rows, splits, i, at, inside)


# ---- gradient ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "first_row", "first_column"])
def gradient(
    s_logits, s_hidden, s_weight, s_bias, s_low, s_lora, t_logits, t_hidden, t_weight, t_bias,
    t_low, t_lora, s_log_sum, s_tempered_log_sum, t_log_sum, t_tempered_log_sum, mixture, targets,
    target_logits, g_sums, entropies, poles, weights, coefficients, entropy_weights,
    live,  # (blocks of rows, tiles of the vocabulary) whose gradient is wanted
    out,  # (rows, columns of this block): of the raw logits
    s_logits_stride, s_hidden_stride, s_weight_stride, s_lora_stride, t_logits_stride,
    t_hidden_stride, t_weight_stride, t_lora_stride, live_stride, out_stride, rows, first_row,
    columns, first_column, s_width, t_width, s_rank, t_rank, s_softcap, s_scale, s_inv_tau,
    t_softcap, t_scale, t_inv_tau, a, b,
    TERMS: tl.constexpr,  # None: no divergence
    HELPERS: tl.constexpr,
    MIXTURE: tl.constexpr,
    SMOOTH_MASK: tl.constexpr,  # the poles at which the divergence has no gradient
    COEFFICIENT: tl.constexpr,  # whether the log-probability of the target has a gradient
    TARGETS: tl.constexpr, ENTROPY_WEIGHT: tl.constexpr,
    SKIP: tl.constexpr,  # whether some tiles are not live: their gradient is 0
    MASKED: tl.constexpr, S_TEMPERED: tl.constexpr, T_TEMPERED: tl.constexpr, FUSED: tl.constexpr,
    S_BIAS: tl.constexpr, S_LORA: tl.constexpr, S_SOFTCAP: tl.constexpr, T_BIAS: tl.constexpr,
    T_LORA: tl.constexpr, T_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """w (g - q sum g) + c (onehot - q1) - e q1 (log q1 + H), through softcap and scale."""
    row = tl.program_id(0) * BLOCK_N
    column = tl.program_id(1) * BLOCK_V
    i = row + tl.arange(0, BLOCK_N)[:, None]
    j = column + tl.arange(0, BLOCK_V)[None, :]
    inside = i < rows
    at = first_row + i
    to = out + i.to(tl.int64) * out_stride + j
    if SKIP:
        tile_of = (first_column + column) // BLOCK_V
        if tl.load(live + tl.program_id(0).to(tl.int64) * live_stride + tile_of) == 0:
            nothing = tl.zeros((BLOCK_N, BLOCK_V), out.dtype.element_ty)
            tl.store(to, nothing, mask=inside & (j < columns))
            return
    if TERMS is not None:
        raw = side_tile(
            t_logits, t_hidden, t_weight, t_bias, t_low, t_lora, t_logits_stride, t_hidden_stride,
            t_weight_stride, t_lora_stride, row, column, rows, columns, t_width, t_rank, t_softcap,
            t_scale, FUSED, T_BIAS, T_LORA, T_SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, BLOCK_V,
            BLOCK_D,
        )
        guide = floored(raw, column, columns, MASKED, BLOCK_V)
    tile = side_tile(
        s_logits, s_hidden, s_weight, s_bias, s_low, s_lora, s_logits_stride, s_hidden_stride,
        s_weight_stride, s_lora_stride, row, column, rows, columns, s_width, s_rank, s_softcap,
        s_scale, FUSED, S_BIAS, S_LORA, S_SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, BLOCK_V,
        BLOCK_D,
    )
    learner = floored(tile, column, columns, MASKED, BLOCK_V)
    value = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    s_high, s_low_part = row_log_sum(s_log_sum, at, inside)
    if TERMS is not None:
        if S_TEMPERED or T_TEMPERED:
            s_h, s_l = row_log_sum(s_tempered_log_sum, at, inside)
            t_h, t_l = row_log_sum(t_tempered_log_sum, at, inside)
            lq = log_prob_of(at_temperature(learner, s_inv_tau, True), s_h, s_l)
            lp = log_prob_of(at_temperature(guide, t_inv_tau, True), t_h, t_l)
        else:
            t_h, t_l = row_log_sum(t_log_sum, at, inside)
            lq = log_prob_of(learner, s_high, s_low_part)
            lp = log_prob_of(guide, t_h, t_l)
        q, p = tl.exp(lq), tl.exp(lp)
        if MIXTURE:
            a = tl.load(mixture + at, mask=inside, other=0.0)
        _, g = terms_of(p, lp, q, lq, a, b, TERMS, HELPERS)
        weight = tl.load(weights + at, mask=inside, other=0.0) * s_inv_tau
        g_sum = tl.load(g_sums + at, mask=inside, other=0.0)
        if MASKED and SMOOTH_MASK != 0:
            smooth = (tl.load(poles + at, mask=inside, other=0) & SMOOTH_MASK) == 0
            weight = tl.where(smooth, weight, 0.0)
            g_sum = tl.where(smooth, g_sum, 0.0)  # no 0 * inf
        value = weight * (g - q * g_sum)
    if COEFFICIENT or ENTROPY_WEIGHT:
        lq = log_prob_of(learner, s_high, s_low_part)
        q = tl.exp(lq)
        if COEFFICIENT:
            coefficient = tl.load(coefficients + at, mask=inside, other=0.0)
            pull = -coefficient * q
            if TARGETS:
                own = tl.load(targets + at, mask=inside, other=-1).to(tl.int32) - first_column
                target = tl.load(target_logits + at, mask=inside, other=0.0)
                rest = minus_expm1(log_prob_of(target, s_high, s_low_part))
                pull = tl.where(j == own, coefficient * rest, pull)
            value += pull
        if ENTROPY_WEIGHT:
            entropy = tl.load(entropies + at, mask=inside, other=0.0)
            value -= tl.load(entropy_weights + at, mask=inside, other=0.0) * q * (lq + entropy)
    if S_SOFTCAP:
        capped = tl.where(tile == -float("inf"), 0.0, tile) / (s_softcap * s_scale)  # no 0 * inf
        value *= (1 - capped * capped) * s_scale
    else:
        value *= s_scale
    tl.store(to, value.to(out.dtype.element_ty), mask=inside & (j < columns))
