"""How many rows at a time: from shapes and a budget in bytes to chunks, tiles and blocks.

The workspace of *retain* is the logits of a chunk for each side and one block of the head converted
where it is not fp32, or what GEMMs pack instead; that of *recompute* is a (N, block) buffer for
each side, or for the gradient alone where kernels project, and what GEMMs convert. Where the steps
are not compiled, the temporaries of a tile of a few rows come on top. Gradients, results and O(N)
vectors are not workspace.
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
WHOLE_COLUMNS = (128, 16)  # of a block: whole tiles, or at least whole 16-byte loads
FEW_ROWS = 256  # of hidden states, are converted at once however narrow a block is
FP32 = 4
TOP_BYTES = 13 * 8  # of a row for each of the likeliest tokens of its teacher: in float64
LOGIT_BYTES = 15  # that passes over one side's logits in memory move


CLASS_ROWS = 4  # rows whose classes are made at once, at the least: threads share them

Packing = Callable[[int, int], int]  # rows, columns -> bytes of the operands that a GEMM packs


class ClassSizes(NamedTuple):
    """Of a divergence over classes (verbalizer.py)."""

    teacher_vocabulary: int
    classes: int
    gathered: int  # elements of a row at once, where gathering takes temporaries


class Plan(NamedTuple):
    chunk_rows: int  # of chunks that may be cut anywhere
    tile_rows: int
    most_rows: int  # that the budget holds, where a chunk may not be cut


NO_ROW = Plan(1, 1, 0)  # where the budget doesn't hold one, and *recompute* does without


def plan_retain(
    vocab_size: int,
    widths: tuple[int, ...],
    convert: bool,
    budget: int,
    *,
    packing: Packing | None = None,
    cached: bool = True,
    temporaries: bool = True,
    classes: ClassSizes | None = None,
    top_k: int = 0,
) -> Plan:
    """Rows a chunk and rows a tile, for a side of each width (student, teacher).

    `cached`: whether tiles shall fit a cache (a CPU's); `temporaries`: whether tiles need any;
    `classes`: where the divergence is over classes, which are made tile by tile; `top_k`: of the
    teacher's likeliest tokens, where these alone are known.

    Raises:
        ValueError: the budget does not hold one row; says the least that works.
    """
    row = vocab_size * FP32
    fixed, chunk_row, tile_row = _row_bytes(vocab_size, widths, convert, temporaries, classes)
    chunk_row += top_k * TOP_BYTES
    least = fixed + chunk_row + tile_row
    _check(budget, least, f"a vocabulary of {vocab_size:,}")

    def plan(left: int) -> Plan:
        most = left // (chunk_row + tile_row)  # tiles as long as chunks
        wanted = _tile_bytes(budget, cached) // row
        if classes is not None:  # an accelerator wants few launches
            wanted = max(wanted, CLASS_ROWS if cached else most)
        tile_rows = max(1, min(wanted, most))
        most_rows = (left - tile_rows * tile_row) // chunk_row
        return Plan(min(MAX_CHUNK, most_rows), tile_rows, most_rows)

    most = plan(budget - fixed)
    if packing is None:
        return most
    held = packing(most.chunk_rows, vocab_size)
    return plan(max(budget - held, budget // 2, least))  # a little more where the budget is tiny


def _row_bytes(
    vocab_size: int,
    widths: tuple[int, ...],
    convert: bool,
    temporaries: bool,
    classes: ClassSizes | None = None,
) -> tuple[int, int, int]:
    """What *retain* holds whatever its chunks are, for each row of a chunk, and of a tile."""
    row = largest = vocab_size * FP32
    chunk_row, tile_row = len(widths) * row, 0
    if classes is not None:
        chunk_row += classes.teacher_vocabulary * FP32 - row
        largest = max(vocab_size, classes.teacher_vocabulary) * FP32
        tile_row = class_row_bytes(vocab_size, classes)
    tile_row += TEMPORARIES * largest * temporaries
    if not convert:
        return 0, chunk_row, tile_row
    block = min(BLOCK, largest // FP32) * FP32
    return 2 * block * max(widths), chunk_row + sum(widths) * FP32 + block, tile_row


def class_row_bytes(vocab_size: int, classes: ClassSizes) -> int:
    """Class logits of both sides; a gradient and shares of tokens; what is gathered."""
    return (2 * classes.classes + 2 * vocab_size + classes.gathered) * FP32


def _check(budget: int, least: int, what: str) -> None:
    if budget < least:
        raise ValueError(
            f"memory_budget must be at least {least:,} bytes for {what}, got {budget:,}"
        )


def _tile_bytes(budget: int, cached: bool) -> int:
    return TILE_BYTES if cached else max(TILE_BYTES, budget // TILE_SHARE)


def prefers_recompute(
    rows: int,
    vocab_size: int,
    widths: tuple[int, ...],
    item_size: int,
    chunk_rows: int,
    balance: float,
) -> bool:
    """Whether projecting twice in fused kernels costs less than what *retain* moves.

    *retain* reads the heads and adds to the student's gradient for every chunk, and passes over
    logits in memory; *recompute* pays with the FLOPs of one more projection of each side, of which
    a device has `balance` in the time of a byte.
    """
    chunks = -(-rows // max(chunk_rows, 1))
    head = vocab_size * (sum(widths) * item_size + widths[0] * (item_size + 2 * FP32))
    moved = chunks * head + rows * vocab_size * LOGIT_BYTES * len(widths)
    return moved * balance > 2 * rows * vocab_size * sum(widths)


def copied_rows(rows: int, columns: int) -> int:
    """Rows of hidden states that are converted at once, so that the copy of many rows is no larger
    than that of a block of the head."""
    return min(rows, max(min(BLOCK, columns), FEW_ROWS))


def _whole(columns: int) -> int:
    """Kernels and GEMMs are slower at an odd stride: the buffer's is its number of columns."""
    step = next((step for step in WHOLE_COLUMNS if step <= columns), 1)
    return columns // step * step


def plan_block(
    rows: int,
    widths: tuple[int, ...],  # of the sides that GEMMs outside of kernels take
    convert: bool,
    budget: int,
    *,
    cell: int,  # bytes that each row and column of a block takes
    packing: Packing | None = None,
    cached: bool = True,
    temporaries: bool = True,
    whole_rows: int = 0,
) -> tuple[int, int]:
    """Columns a vocabulary block of *recompute*, and rows a tile.

    `whole_rows`: the vocabulary, where a *retain* sweep shall fit the budget as well.

    Raises:
        ValueError: the budget does not hold one column (or whole row); says the least that works.
    """
    rows = max(rows, 1)
    fixed = min(rows, FEW_ROWS) * max(widths) * FP32 if convert else 0
    column = cell * rows + (3 if convert else 1) * max(widths) * FP32
    if temporaries:
        column += TEMPORARIES * FP32  # a tile of one row
    least = max(fixed + column, sum(_row_bytes(whole_rows, widths, convert, temporaries)))
    what = f"{rows:,} rows" + (f" and a vocabulary of {whole_rows:,}" if whole_rows else "")
    _check(budget, least, what)
    left = budget - fixed
    tile_bytes = 0
    if temporaries:
        tile_bytes = min(_tile_bytes(budget, cached), left // (2 * TEMPORARIES))
    beside = left - TEMPORARIES * tile_bytes
    block = max(1, min(BLOCK, beside // column))
    if packing is not None:
        block = min(BLOCK, max(beside - packing(rows, block), beside // 2, column) // column)
    block = _whole(block)
    most = 1 + (left - block * column) // (TEMPORARIES * block * FP32)
    return block, max(1, min(rows, tile_bytes // (block * FP32), most))
