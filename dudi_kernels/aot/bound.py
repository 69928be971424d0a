"""A bound on the use of the tensor cores: cycles of each unit for one tile (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dudi_kernels.aot.machine_code import Instruction, Loop, Resources, by_class, inside, is_mma
from dudi_kernels.aot.machine_code import loops as loops_of
from dudi_kernels.aot.targets import TENSOR_COLUMNS, Gpu
from dudi_kernels.backends.triton.launch import Blocks

REGISTERS = 8  # are allocated together, for each thread
RESERVED = {"cuda": 1024, "hip": 0}  # bytes of shared memory for each program


class Bound(NamedTuple):
    """Cycles of a multiprocessor for one tile of rows x columns, both projections."""

    tensor: float
    shared: float  # operands on their way from shared memory
    load: float  # issue slots of the loops over the width
    special: float  # of the part between the loops: special functions,
    issue: float  # and issue slots
    programs: int  # resident at once
    use: float  # of the tensor cores, at most


def programs(found: Resources, gpu: Gpu) -> int:
    """That a multiprocessor holds."""
    each = -(-found.registers // REGISTERS) * REGISTERS
    by_registers = gpu.registers // max(1, each * found.threads)
    by_shared = gpu.shared_total // max(1, found.shared + RESERVED[gpu.kind])
    by_tensor = TENSOR_COLUMNS // max(1, found.tensor_columns)
    return max(1, min(by_registers, by_shared, by_tensor, gpu.threads // found.threads))


def bound(
    code: list[Instruction],
    found: Resources,
    gpu: Gpu,
    blocks: Blocks,
    layout: tuple[int, int],  # warps along the rows, and along the columns
    widths: Sequence[int],  # of the projections, in order
) -> Bound | None:
    """None where not every projection is one loop on tensor cores."""
    tile, inner = width_loops(code, gpu)
    if not inner or len(inner) != len(widths):
        return None
    tensor = blocks.rows * blocks.columns * sum(widths) / gpu.half_macs
    warps = found.threads / gpu.warp
    load = shared = 0.0
    for loop, width in zip(inner, widths, strict=True):
        steps = width / blocks.width
        load += steps * len(inside(code, loop)) * warps / gpu.issue
        shared += steps * _operand_bytes(gpu, blocks, layout) / gpu.shared_bytes
    between = _between(code, tile, inner)
    counts = by_class(between, gpu)
    special = counts["special"] * found.threads / gpu.specials
    issue = len(between) * warps / gpu.issue
    count = programs(found, gpu)
    busy, exposed = max(tensor, shared, load), max(special, issue)
    total = max(busy, load + issue) if count > 1 else busy + exposed
    return Bound(tensor, shared, load, special, issue, count, tensor / total)


def width_loops(code: list[Instruction], gpu: Gpu) -> tuple[Loop | None, list[Loop]]:
    """The loop over tiles; and the loops over the width: the innermost with tensor-core
    instructions."""
    found = [loop for loop in loops_of(code) if any(is_mma(i, gpu) for i in inside(code, loop))]
    inner = [
        loop
        for loop in found
        if not any(o != loop and loop.start <= o.start and o.stop <= loop.stop for o in found)
    ]
    outer = [loop for loop in found if loop not in inner]
    return (outer[0] if outer else None), inner


def _between(code: list[Instruction], tile: Loop | None, inner: list[Loop]) -> list[Instruction]:
    """The instructions of a tile that are in none of the loops over the width."""
    whole = code if tile is None else inside(code, tile)
    return [i for i in whole if not any(o.start <= i.address <= o.stop for o in inner)]


def _operand_bytes(gpu: Gpu, blocks: Blocks, layout: tuple[int, int]) -> float:
    """Read from shared memory for a step of the width."""
    if gpu.mma == ("HGMMA",):  # of 64 rows, by the four warps of a group
        down, across = blocks.rows // 64, layout[1]
    elif gpu.mma == ("UTCHMMA",):
        down, across = 1, 1
    else:
        down, across = layout
    return (down * blocks.columns + across * blocks.rows) * blocks.width * 2
