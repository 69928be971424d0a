"""How many rows at a time: from shapes and a budget in bytes to chunks, tiles and blocks.

The workspace of *retain* is the logits of a chunk for each side and one block of the head converted
where it is not fp32, or what GEMMs pack instead; that of *recompute* is a (N, block) buffer for
each side, or for the gradient alone where kernels project. Where the steps are not compiled, the
temporaries of a tile of a few rows come on top.
Gradients, results and O(N) vectors are not workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

DEFAULT_BUDGET = 256 * 2**20  # bytes
TILE_BYTES = 2**19  # of one temporary: some of them fit a CPU's cache together
TILE_SHARE = 32  # part of the budget that one is elsewhere: an accelerator wants few launches
TEMPORARIES = 16  # tiles alive at once in the element-wise part, at the most
MAX_CHUNK = 384  # rows; more gained nothing, and 1024 were 3 to 9 % slower on a CPU
BLOCK = 4096  # columns of a vocabulary block, at the most
FP32 = 4
HALF_BALANCE = 150  # FLOPs in the time of a byte, of GPUs since A100: 153 to 295
FP32_BALANCE = 10  # without tensor cores: 10 to 20
LOGIT_BYTES = 15  # that passes over one side's logits in memory move


Packing = Callable[[int, int], int]  # rows, columns -> bytes of the operands that a GEMM packs


class Plan(NamedTuple):
    chunk_rows: int  # of chunks that may be cut anywhere
    tile_rows: int
    most_rows: int  # that the budget holds, where a chunk may not be cut


def plan_retain(
    vocab_size: int,
    widths: tuple[int, ...],
    convert: bool,
    budget: int,
    *,
    packing: Packing | None = None,
    cached: bool = True,
    temporaries: bool = True,
) -> Plan:
    """Rows a chunk and rows a tile, for a side of each width (student, teacher).

    `cached`: whether tiles shall fit a cache (a CPU's); `temporaries`: whether tiles need any.

    Raises:
        ValueError: the budget does not hold one row; says the least that works.
    """
    row = vocab_size * FP32
    fixed = 2 * min(BLOCK, vocab_size) * max(widths) * FP32 if convert else 0
    chunk_row = len(widths) * row + (sum(widths) * FP32 if convert else 0)
    if convert:
        chunk_row += min(BLOCK, vocab_size) * FP32
    tile_row = TEMPORARIES * row if temporaries else 0
    least = fixed + chunk_row + tile_row
    if budget < least:
        raise ValueError(
            f"memory_budget must be at least {least:,} bytes for a vocabulary of {vocab_size:,}, "
            f"got {budget:,}"
        )

    def plan(left: int) -> Plan:
        most = left // (chunk_row + tile_row)  # tiles as long as chunks
        tile_rows = max(1, min(_tile_bytes(budget, cached) // row, most))
        most_rows = (left - tile_rows * tile_row) // chunk_row
        return Plan(min(MAX_CHUNK, most_rows), tile_rows, most_rows)

    most = plan(budget - fixed)
    if packing is None:
        return most
    held = packing(most.chunk_rows, vocab_size)
    return plan(max(budget - held, budget // 2, least))  # a little more where the budget is tiny


def _tile_bytes(budget: int, cached: bool) -> int:
    return TILE_BYTES if cached else max(TILE_BYTES, budget // TILE_SHARE)


def prefers_recompute(
    rows: int, vocab_size: int, widths: tuple[int, ...], item_size: int, chunk_rows: int
) -> bool:
    """Whether projecting twice in fused kernels costs less than what *retain* moves.

    *retain* reads the heads and adds to the student's gradient for every chunk, and passes over
    logits in memory; *recompute* pays with the FLOPs of one more projection of each side.
    """
    chunks = -(-rows // max(chunk_rows, 1))
    head = vocab_size * (sum(widths) * item_size + widths[0] * (item_size + 2 * FP32))
    moved = chunks * head + rows * vocab_size * LOGIT_BYTES * len(widths)
    balance = HALF_BALANCE if item_size < FP32 else FP32_BALANCE
    return moved * balance > 2 * rows * vocab_size * sum(widths)


def plan_block(
    rows: int,
    widths: tuple[int, ...],
    convert: bool,
    budget: int,
    *,
    cell: int,  # bytes that each row and column of a block takes
    packing: Packing | None = None,
    cached: bool = True,
    temporaries: bool = True,
) -> tuple[int, int]:
    """Columns a vocabulary block of *recompute*, and rows a tile.

    Raises:
        ValueError: the budget does not hold one column; says the least that works.
    """
    rows = max(rows, 1)
    column = cell * rows + (3 if convert else 1) * max(widths) * FP32
    tile_bytes = 0
    if temporaries:
        tile_bytes = min(_tile_bytes(budget, cached), budget // (2 * TEMPORARIES))
        column += TEMPORARIES * FP32  # a tile of one row
    if convert:
        budget -= rows * sum(widths) * FP32
    if budget < column:
        raise ValueError(
            f"memory_budget must be at least {column:,} bytes for {rows:,} rows, got {budget:,}"
        )
    left = budget - TEMPORARIES * tile_bytes
    block = min(BLOCK, left // column)
    if packing is not None:
        block = min(BLOCK, max(left - packing(rows, block), left // 2, column) // column)
    return block, max(1, min(rows, tile_bytes // (block * FP32)))
