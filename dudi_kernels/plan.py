"""How many rows at a time: from shapes and a budget in bytes to chunks and tiles.

The workspace of *retain* is the logits of a chunk for each side, the temporaries of a tile of a few
rows, and a block of the head upcast where it is not fp32. Gradients are not workspace.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_BUDGET = 256 * 2**20  # bytes
TILE_BYTES = 2**20  # of one temporary: some of them fit the cache together
TEMPORARIES = 12  # tiles alive at once in the element-wise part, at the most
MAX_CHUNK = 1024  # rows; a GEMM gains nothing from more
BLOCK = 4096  # columns of a streamed vocabulary block, at the most
FP32 = 4


class Plan(NamedTuple):
    chunk_rows: int
    tile_rows: int


def plan_retain(
    vocab_size: int, widths: tuple[int, ...], upcast: bool, memory_budget: int
) -> Plan:
    """Rows a chunk and rows a tile for `len(widths)` sides (student, teacher).

    Raises:
        ValueError: the budget does not hold the logits of one row; says the least that works.
    """
    row = vocab_size * FP32
    tile_rows = max(1, TILE_BYTES // row)
    fixed = TEMPORARIES * row + (BLOCK * max(widths) * FP32 if upcast else 0)
    each = len(widths) * row + sum(widths) * FP32
    if memory_budget < fixed + each:
        raise ValueError(
            f"memory_budget must be at least {fixed + each:,} bytes for a vocabulary of "
            f"{vocab_size:,}, got {memory_budget:,}"
        )
    while tile_rows > 1 and memory_budget < fixed + (tile_rows - 1) * TEMPORARIES * row + each * tile_rows:
        tile_rows -= 1
    left = memory_budget - fixed - (tile_rows - 1) * TEMPORARIES * row
    return Plan(min(MAX_CHUNK, left // each), tile_rows)


def plan_block(rows: int, width: int, upcast: bool, memory_budget: int) -> int:
    """Columns a vocabulary block of *recompute*: a few (N, block) buffers within the budget.

    Raises:
        ValueError: the budget does not hold one column; says the least that works.
    """
    column = 3 * max(rows, 1) * FP32 + (width * FP32 if upcast else 0)
    if memory_budget < column:
        raise ValueError(
            f"memory_budget must be at least {column:,} bytes for {rows:,} rows, got {memory_budget:,}"
        )
    return min(BLOCK, memory_budget // column)
