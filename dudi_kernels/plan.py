"""How many rows at a time: from shapes and a budget in bytes to chunks, tiles and blocks.

The workspace of *retain* is the logits of a chunk for each side, the temporaries of a tile of a few
rows, and one block of the head converted where it is not fp32; that of *recompute* is a few (N,
block) buffers. Gradients, results and O(N) vectors are not workspace.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_BUDGET = 256 * 2**20  # bytes
TILE_BYTES = 2**19  # of one temporary: some of them fit a CPU's cache together
TILE_SHARE = 32  # part of the budget that one is elsewhere: an accelerator wants few launches
TEMPORARIES = 14  # tiles alive at once in the element-wise part, at the most
COLUMNS = 3  # (N, block) buffers alive at once in *recompute*
MAX_CHUNK = 384  # rows; more gained nothing, and 1024 were 3 to 9 % slower on a CPU
BLOCK = 4096  # columns of a vocabulary block, at the most
FP32 = 4


class Plan(NamedTuple):
    chunk_rows: int  # of chunks that may be cut anywhere
    tile_rows: int
    most_rows: int  # that the budget holds, where a chunk may not be cut


def plan_retain(
    vocab_size: int, widths: tuple[int, ...], convert: bool, budget: int, cached: bool = True
) -> Plan:
    """Rows a chunk and rows a tile, for a side of each width (student, teacher).

    `cached`: whether tiles shall fit a cache (a CPU's).

    Raises:
        ValueError: the budget does not hold one row; says the least that works.
    """
    row = vocab_size * FP32
    fixed = 2 * min(BLOCK, vocab_size) * max(widths) * FP32 if convert else 0
    chunk_row = len(widths) * row + (sum(widths) * FP32 if convert else 0)
    if convert:
        chunk_row += min(BLOCK, vocab_size) * FP32
    tile_row = TEMPORARIES * row
    least = fixed + chunk_row + tile_row
    if budget < least:
        raise ValueError(
            f"memory_budget must be at least {least:,} bytes for a vocabulary of {vocab_size:,}, "
            f"got {budget:,}"
        )
    most = (budget - fixed) // (chunk_row + tile_row)  # tiles as long as chunks
    tile_bytes = TILE_BYTES if cached else max(TILE_BYTES, budget // TILE_SHARE)
    tile_rows = max(1, min(tile_bytes // row, most))
    most_rows = (budget - fixed - tile_rows * tile_row) // chunk_row
    return Plan(min(MAX_CHUNK, most_rows), tile_rows, most_rows)


def plan_block(rows: int, width: int, convert: bool, budget: int) -> int:
    """Columns a vocabulary block of *recompute*.

    Raises:
        ValueError: the budget does not hold one column; says the least that works.
    """
    column = COLUMNS * max(rows, 1) * FP32 + (2 if convert else 1) * width * FP32
    if budget < column:
        raise ValueError(
            f"memory_budget must be at least {column:,} bytes for {rows:,} rows, got {budget:,}"
        )
    return min(BLOCK, budget // column)
