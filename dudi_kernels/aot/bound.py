"""A bound on the use of the tensor cores: cycles of each unit for one tile (docs/kernels.md)."""

from __future__ import annotations

from typing import NamedTuple

from dudi_kernels.aot.machine_code import Instruction, Loop, Resources, by_class, inside, is_mma
from dudi_kernels.aot.machine_code import loops as loops_of
from dudi_kernels.aot.targets import Gpu, Shape
from dudi_kernels.backends.triton.launch import Blocks

SCHEDULERS = 4  # of a multiprocessor, an instruction a clock each


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
    by_registers = gpu.registers // max(1, found.registers * found.threads)
    by_shared = gpu.shared_total // max(1, found.shared + 1024)
    return max(1, min(by_registers, by_shared, gpu.threads // found.threads))


def bound(
    code: list[Instruction], found: Resources, gpu: Gpu, blocks: Blocks, shape: Shape
) -> Bound | None:
    """None where there are no tensor-core instructions in a loop."""
    tile, inner = _tile_loop(code, gpu)
    if not inner:
        return None
    widths = (shape.teacher_width, shape.width)
    tensor = blocks.rows * blocks.columns * sum(widths) / gpu.half_macs
    warps = found.threads / gpu.warp
    load = shared = 0.0
    for loop, width in zip(inner, widths, strict=False):
        steps = width / blocks.width
        load += steps * len(inside(code, loop)) * warps / SCHEDULERS
        shared += steps * _operand_bytes(gpu, blocks) / gpu.shared_bytes
    between = _between(code, tile, inner)
    counts = by_class(between, gpu)
    special = counts["special"] * found.threads / gpu.specials
    issue = len(between) * warps / SCHEDULERS
    count = programs(found, gpu)
    busy, exposed = max(tensor, shared, load), max(special, issue)
    total = max(busy, load + issue) if count > 1 else busy + exposed
    return Bound(tensor, shared, load, special, issue, count, tensor / total)


def _tile_loop(code: list[Instruction], gpu: Gpu) -> tuple[Loop | None, list[Loop]]:
    """The loop over tiles, and in it the innermost loops with tensor-core instructions."""
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


def _operand_bytes(gpu: Gpu, blocks: Blocks) -> float:
    """Read from shared memory for a step of the width."""
    if gpu.mma == ("HGMMA",):  # a warp group reads 64 rows, and all columns
        groups = blocks.rows / 64
        return groups * (64 + blocks.columns) * blocks.width * 2
    if gpu.mma == ("UTCHMMA",):
        return (blocks.rows + blocks.columns) * blocks.width * 2
    across = 2 if blocks.columns >= blocks.rows else 1  # warps along the columns
    down = blocks.warps / across
    return (down * blocks.columns + across * blocks.rows) * blocks.width * 2
