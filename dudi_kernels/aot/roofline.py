"""What a loss costs on paper: FLOPs, bytes and time at the roofline of a GPU (docs/kernels.md).

forward KL, forward and backward, bf16 inputs. GEMMs run at the tensor cores' peak and element-wise
passes at the memory's; passes over logits in memory do not overlap GEMMs, epilogues in a kernel do.
"""

from __future__ import annotations

from typing import NamedTuple

from dudi_kernels.aot.targets import GPUS, ROWS, SHAPES, Gpu, Shape
from dudi_kernels.plan import DEFAULT_BUDGET, plan_retain
from dudi_kernels.sweep import even

HALF = 2  # bytes
FP32 = 4
# Bytes of memory traffic for each pair of logits, element-wise passes alone:
RETAIN = 8 + 8 + 4 + 4 + 2 + 4  # statistics, gradient (read, write), rounded to bf16, two GEMMs
# fp32 copies, log-softmax of both, divergence and its gradient: read and written by itself each
DENSE = 2 * (HALF + FP32) + 2 * 2 * FP32 + 3 * FP32 + 5 * FP32 + HALF + 2 * HALF
RECOMPUTE = 3 * HALF  # the gradient of a block: written, and read by two GEMMs


class Cost(NamedTuple):
    flops: float
    gigabytes: float
    milliseconds: float


def peak(gpu: Gpu) -> float:
    """FLOP/s of the tensor cores."""
    return 2 * gpu.half_macs * gpu.units * gpu.clock * 1e9


def costs(gpu: Gpu, shape: Shape, rows: int) -> dict[str, Cost]:
    v, d, e = shape
    student, teacher = 2.0 * rows * v * d, 2.0 * rows * v * e
    logits, heads = rows * v, v * (d + e) * HALF
    chunk = even(
        rows,
        plan_retain(v, (d, e), False, DEFAULT_BUDGET, cached=False, temporaries=False).chunk_rows,
    )
    sweeps = -(-rows // chunk)
    # heads, the student's once more, and its gradient in fp32 read and written
    each = heads + v * d * (HALF + 2 * FP32)
    once = heads + v * d * 2 * HALF
    return {
        "dense": _cost(gpu, 3 * student + teacher, once, logits * DENSE, False),
        "chunked autograd": _cost(gpu, 3 * student + teacher, sweeps * each, logits * DENSE, False),
        "retain": _cost(gpu, 3 * student + teacher, sweeps * each, logits * RETAIN, False),
        "recompute": _cost(gpu, 4 * student + 2 * teacher, heads + once, logits * RECOMPUTE, True),
    }


def _cost(gpu: Gpu, flops: float, operands: float, passes: float, overlap: bool) -> Cost:
    compute, memory = flops / peak(gpu), gpu.memory * 1e12
    gemms = max(compute, operands / memory)
    seconds = max(gemms, (operands + passes) / memory) if overlap else gemms + passes / memory
    return Cost(flops, (operands + passes) / 1e9, seconds * 1e3)


def table(targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")) -> str:
    """Markdown."""
    names = [GPUS[target].name for target in targets]
    lines = [
        "| shape, N = 4,096 | way | TFLOP | GB | " + " | ".join(f"{n}, ms" for n in names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for name, shape in SHAPES.items():
        found = [costs(GPUS[target], shape, ROWS) for target in targets]
        for way, cost in found[0].items():
            times = " | ".join(f"{own[way].milliseconds:.1f}" for own in found)
            lines.append(
                f"| {name} | {way} | {cost.flops / 1e12:.1f} | {cost.gigabytes:.1f} | {times} |"
            )
    return "\n".join(lines)
