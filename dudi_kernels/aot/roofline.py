"""What a loss costs on paper: FLOPs, bytes and time at the roofline of a GPU (docs/kernels.md).

Forward and backward, bf16 inputs. GEMMs run at the peak of the tensor cores, of memory or of the
L2 cache, whichever takes longest; element-wise passes run at the memory's. Passes over logits in
memory do not overlap GEMMs, epilogues in a kernel do. What other libraries move was read off their
sources, in the versions that are named; a pass that a compiler may fuse is taken as fused.
"""

from __future__ import annotations

from typing import NamedTuple

from dudi_kernels.aot.targets import GPUS, ROWS, SHAPES, Gpu, Shape
from dudi_kernels.plan import BLOCK, DEFAULT_BUDGET, plan_retain
from dudi_kernels.sweep import even

HALF = 2  # bytes
FP32 = 4
ADD = 2 * FP32  # an fp32 sum is read and written
ROUND = FP32 + HALF  # it is read, and written in the head's dtype

# ---- bytes of memory traffic for each pair of logits (the teacher's and the student's) -----------

# GEMMs write both in fp32; statistics read both; the gradient reads both and writes one; it is
# rounded, and read by two GEMMs.
RETAIN = 2 * FP32 + 2 * FP32 + 3 * FP32 + ROUND + 2 * HALF
# The gradient of a block is written, and read by two GEMMs.
RECOMPUTE = 3 * HALF
# Eager torch: GEMMs write both in bf16; fp32 copies, log-softmax of both, divergence and its
# gradient, each read and written by itself; the gradient in bf16, read by two GEMMs.
DENSE = 2 * HALF + 2 * (HALF + FP32) + 2 * 2 * FP32 + 3 * FP32 + 5 * FP32 + HALF + 2 * HALF
# LigerFusedLinearJSDLoss 0.8.5 (beta = 0, no hard loss), compiled: GEMMs write both in bf16; three
# fused reads of both (log-sum-exps; loss and the gradient's sum; gradient), the gradient in bf16.
LIGER = 2 * HALF + 3 * 2 * HALF + HALF + 2 * HALF
LIGER_CHUNK = 1024  # rows; its default
# trl.kernels.chunked_divergence of TRL 1.16 (beta = 0): forward, GEMMs write both in fp32 and a
# kernel reads them; backward, the same again, the gradient in place, rounded, read by two GEMMs.
TRL = 2 * (2 * FP32 + 2 * FP32) + FP32 + ROUND + 2 * HALF
TRL_CHUNK = 4096  # rows
TRL_BLOCK = 32_768  # columns

# cut-cross-entropy 25.1.1: tiles (rows, columns) of its two kernels, and how many tiles of rows
# take the same columns one after the other, so that L2 serves all of them but the first.
CCE_FORWARD = (256, 128)
CCE_BACKWARD = (128, 128)
CCE_GROUP = 8

# ---- L2 ------------------------------------------------------------------------------------------

# Bytes a clock. That of A100 is published (NVIDIA's whitepaper on it); for H100 none is, and the
# same is taken: 8.8 TB/s were measured on an H800 PCIe (github.com/chanzhennan/ChipBenchmarker),
# 98 % of it. B200 has two caches and a link, of which nothing is published: its times leave L2 out.
L2_BYTES = {"A100": 5120, "H100": 5120}
# Rows and columns of a tile: a library's GEMM, and our kernels' (launch.py).
GEMM_TILE = (128, 256)  # as two blocks of a cluster share operands on H100, an upper bound there
KERNEL_TILES = {"A100": (128, 64), "H100": (128, 128), "B200": (128, 128)}


class Cost(NamedTuple):
    flops: float
    gigabytes: float  # of memory
    l2_gigabytes: float  # operands that tiles of GEMMs read again and again, and what memory moves
    milliseconds: float


class Work(NamedTuple):
    """Of one way to make a loss."""

    flops: float
    operands: float  # bytes of memory that GEMMs read and write, logits apart
    passes: float  # bytes of memory that logits take
    tiles: float  # bytes that tiles of GEMMs read from L2
    overlap: bool  # whether the passes run beside the GEMMs


def peak(gpu: Gpu) -> float:
    """FLOP/s of the tensor cores."""
    return 2 * gpu.half_macs * gpu.units * gpu.clock * 1e9


def costs(gpu: Gpu, shape: Shape, rows: int) -> dict[str, Cost]:
    """Forward KL from a teacher."""
    return {name: _cost(gpu, work) for name, work in _distillation(gpu, shape, rows).items()}


def cross_entropy_costs(gpu: Gpu, shape: Shape, rows: int) -> dict[str, Cost]:
    """Cross-entropy of the student."""
    return {name: _cost(gpu, work) for name, work in _cross_entropy(gpu, shape, rows).items()}


def _reads(products: float, tile: tuple[int, int]) -> float:
    """Bytes of bf16 operands that a GEMM of so many multiply-adds reads, tile by tile."""
    return products * (1 / tile[0] + 1 / tile[1]) * HALF


def _distillation(gpu: Gpu, shape: Shape, rows: int) -> dict[str, Work]:
    v, d, e = shape
    student, teacher = float(rows * v * d), float(rows * v * e)
    logits, heads, head = rows * v, v * (d + e) * HALF, v * d * HALF
    plan = plan_retain(v, (d, e), False, DEFAULT_BUDGET, cached=False, temporaries=False)
    sweeps = -(-rows // even(rows, plan.chunk_rows))
    chunks = -(-rows // TRL_CHUNK)
    once, twice = 3 * student + teacher, 4 * student + 2 * teacher
    gemms = _reads(once, GEMM_TILE)
    # projections read the heads, the hidden states' gradient the student's again; its head's
    # gradient is a sum in fp32 (retain, TRL), in bf16 with a bf16 product beside it (Liger), or
    # written once (dense), from an fp32 block (recompute)
    each = heads + head
    liger = max(1, rows // LIGER_CHUNK) * (each + 4 * head)
    retain = sweeps * (each + v * d * ADD) + v * d * ROUND + _hidden_sums(rows, v, d, BLOCK)
    trl = (
        chunks * (heads + each + v * d * ADD)
        + v * d * (FP32 + ROUND)
        + _hidden_sums(rows, v, d, TRL_BLOCK)
    )
    ours = heads + each + v * d * (FP32 + ROUND) + _hidden_sums(rows, v, d, BLOCK)
    kernels = _reads(2 * (student + teacher), KERNEL_TILES[gpu.name])
    return {
        "dense": Work(2 * once, each + head, logits * DENSE, gemms, False),
        "Liger 0.8.5": Work(2 * once, liger, logits * LIGER, gemms, False),
        "TRL 1.16": Work(2 * twice, trl, logits * TRL, _reads(twice, GEMM_TILE), False),
        "retain": Work(2 * once, retain, logits * RETAIN, gemms, False),
        "recompute": Work(
            2 * twice, ours, logits * RECOMPUTE, kernels + _reads(2 * student, GEMM_TILE), True
        ),
    }


def _hidden_sums(rows: int, vocabulary: int, width: int, block: int) -> int:
    """Bytes of the hidden states' fp32 gradient, added to for every block of columns."""
    return -(-vocabulary // block) * rows * width * ADD


def _cross_entropy(gpu: Gpu, shape: Shape, rows: int) -> dict[str, Work]:
    v, d = shape.vocabulary, shape.width
    products, head = float(rows * v * d), v * d * HALF
    ours = 3 * head + v * d * (FP32 + ROUND) + _hidden_sums(rows, v, d, BLOCK)
    kernels = _reads(2 * products, KERNEL_TILES[gpu.name])
    # For each group of row tiles CCE reads the head once, forward and backward, and in the backward
    # pass reads and writes its gradient: every tile adds to both gradients, in bf16, under locks.
    # Without its filter, which skips tiles with gradients too small for the dtype.
    forward = -(-rows // (CCE_GROUP * CCE_FORWARD[0]))
    backward = -(-rows // (CCE_GROUP * CCE_BACKWARD[0]))
    cce = head * (forward + 3 * backward + 1)  # zeros first
    adds = 2 * _reads(products, CCE_BACKWARD)  # read and written
    tiles = _reads(products, CCE_FORWARD) + _reads(2 * products, CCE_BACKWARD) + adds
    return {
        "recompute": Work(
            8 * products,
            ours,
            rows * v * RECOMPUTE,
            kernels + _reads(2 * products, GEMM_TILE),
            True,
        ),
        "cut-cross-entropy 25.1.1": Work(8 * products, cce, 0, tiles, True),
    }


def _cost(gpu: Gpu, work: Work) -> Cost:
    memory, l2 = gpu.memory * 1e12, L2_BYTES.get(gpu.name, 0) * gpu.clock * 1e9
    moved = work.operands + work.passes
    through = work.tiles + moved
    gemms = max(work.flops / peak(gpu), work.operands / memory, work.tiles / l2 if l2 else 0)
    seconds = gemms + work.passes / memory
    if work.overlap:
        seconds = max(gemms, moved / memory, through / l2 if l2 else 0)
    return Cost(work.flops, moved / 1e9, through / 1e9, seconds * 1e3)


def table(targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")) -> str:
    """Markdown: the distillation, then cross-entropy; L2's bytes with the second target's tiles."""
    gpus = [GPUS[target] for target in targets]
    parts = []
    for title, of in (("forward KL", costs), ("cross-entropy", cross_entropy_costs)):
        lines = [
            f"| {title}, N = {ROWS:,} | way | TFLOP | GB, memory | GB, L2 | "
            + " | ".join(f"{gpu.name}, ms" for gpu in gpus)
            + " |",
            "|---" * (5 + len(gpus)) + "|",
        ]
        for name, shape in SHAPES.items():
            found = [of(gpu, shape, ROWS) for gpu in gpus]
            for way, cost in found[1].items():
                times = " | ".join(f"{own[way].milliseconds:.1f}" for own in found)
                figures = f"{cost.flops / 1e12:.1f} | {cost.gigabytes:.1f}"
                lines.append(f"| {name} | {way} | {figures} | {cost.l2_gigabytes:.0f} | {times} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
