"""Certified skipping: which tiles of the logits' gradient are left out, and what that costs.

A tile is a block of rows by some columns. From the probability mass of both sides in it, reach.py
bounds the L1 norm of its gradient; of each block of rows the smallest tiles are left out as long
as their bounds sum to no more than `tolerance` times the rows' weights. A tile that holds a target
whose log-probability has a gradient is never left out: rare tokens are learnt from their targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dudi_kernels.divergences import Measure
from dudi_kernels.reach import REACH
from dudi_kernels.tiles import RowState, Setting, Tile, log_probs

TILE = 128  # columns, where no kernel has tiles of its own
GAP = 1  # tile between live ones, which is worth less than a GEMM that is cut there
SLACK = 1 + 2.0**-8  # for the rounding of masses, which come from logits in fp32
UNITS = 2.0**32  # of a block's allowance: whole numbers add up the same in any order


Columns = tuple[int, int]  # [start, stop)


class Masses(NamedTuple):
    """Of each row (R) in tiles of columns (T)."""

    student: Tensor  # (R, T) at temperature 1
    tempered: Tensor  # (R, T) at the divergence's temperature
    teacher: Tensor | None
    ratio: Tensor | None  # (R, T) the largest log(q / p), not below 0, where a divergence needs it


# ---- masses and bounds ---------------------------------------------------------------------------


def masses(setting: Setting, state: RowState, tile: Tile) -> Masses:
    """Of rows of whole logits, whose log-sum-exps are known."""
    own = tile.own
    masked, measure = setting.masked, tile.measure
    lq = log_probs(tile.student, state.log_sum[own], 1.0, masked)
    student = tempered = _by_tile(lq.exp())
    teacher = ratio = None
    if measure is not None:
        assert tile.teacher is not None
        if setting.inv_tau != 1.0:
            lq = log_probs(tile.student, state.tempered_log_sum[own], setting.inv_tau, masked)
            tempered = _by_tile(lq.exp())
        log_sum = state.teacher_tempered_log_sum[own]
        lp = log_probs(tile.teacher, log_sum, setting.teacher_inv_tau, masked)
        if REACH[measure.terms].ratio:
            ratio = _by_tile(lq.sub_(lp).clamp_(min=0), largest=True)
        teacher = _by_tile(lp.exp_())
    return Masses(student, tempered, teacher, ratio)


def _by_tile(values: Tensor, largest: bool = False) -> Tensor:  # (R, V) -> (R, T)
    whole = values.shape[1] // TILE * TILE
    parts = [values[:, :whole].unflatten(1, (-1, TILE))] if whole else []
    if whole < values.shape[1]:
        parts.append(values[:, None, whole:])
    return torch.cat([part.amax(2) if largest else part.sum(2) for part in parts], 1)


def bounds(
    setting: Setting,
    state: RowState,
    own: slice,
    measure: Measure | None,
    found: Masses,
    columns: int,  # of a tile
) -> tuple[Tensor, Tensor]:  # (R, T), (R,)
    """Of the L1 norm of the divergence's gradient, weighted; and those weights."""
    if measure is None:
        return torch.zeros_like(found.student), torch.zeros_like(state.weight[own])
    reach = REACH[measure.terms]
    a = measure.a if state.mixture is None or not measure.adaptive else state.mixture[own, None]
    values = reach.bound(found.teacher, found.tempered, found.ratio, columns, a, measure.b)
    rest = (state.g_sum[own, None] - reach.shift(a)).abs()
    weight = state.weight[own].abs() * setting.inv_tau
    values = weight[:, None] * (values + found.tempered * rest)
    return torch.where(weight[:, None] == 0, 0.0, values), weight  # no 0 * inf


# ---- the choice ----------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Blocks of rows (B) by tiles of columns (T)."""

    divergence: Tensor  # (B, T) bounds, added up over the rows of a block
    weight: Tensor  # (B,) of the divergence
    mass: Tensor  # (B, T) of the student, at temperature 1
    rows: int  # of a block, the last of which may have fewer
    columns: int  # of a tile

    @classmethod
    def of(cls, bounded: tuple[Tensor, Tensor], found: Masses, rows: int, columns: int) -> Blocks:
        """From `bounds` and `masses` of rows."""
        divergence, weight, mass = (_by_block(t, rows).sum(1) for t in (*bounded, found.student))
        return cls(divergence, weight, mass, rows, columns)

    def plus(self, other: Blocks) -> Blocks:
        """More rows of the same blocks."""
        return self._replace(
            divergence=self.divergence + other.divergence,
            weight=self.weight + other.weight,
            mass=self.mass + other.mass,
        )


def _by_block(values: Tensor, rows: int) -> Tensor:  # (R, ...) -> (B, rows, ...)
    short = (*(0, 0) * (values.ndim - 1), 0, -len(values) % rows)
    return F.pad(values, short).unflatten(0, (-1, rows))


class Choice(NamedTuple):
    live: Tensor  # (B, T) bool: tiles that are not left out
    bounds: Tensor  # (B, T) float64 of the L1 norm of the gradient
    weight: Tensor  # (B,) float64 of the rows


def choose(
    setting: Setting, state: RowState, own: slice, blocks: Blocks, tolerance: float
) -> Choice:
    """Leave out the smallest tiles of the rows `own`, block by block."""
    weight, values = blocks.weight.double(), blocks.divergence.double()
    keep = torch.zeros_like(values, dtype=torch.bool)
    if state.coefficient is not None:
        pull = _by_block(state.coefficient[own].abs().double(), blocks.rows)
        weight = weight + pull.sum(1)
        values = values + blocks.mass * pull.amax(1, keepdim=True)
        if setting.targets is not None:
            tile = _by_block(setting.targets[own], blocks.rows) // blocks.columns
            pulled = torch.zeros_like(values).scatter_reduce_(1, tile, pull, "amax")
            keep = pulled > 0
    values = values * SLACK
    ordered, index = values.masked_fill(keep, 0).sort(1)
    share = torch.where(ordered == 0, 0.0, ordered / (weight * tolerance)[:, None])  # no 0 / 0
    units = torch.where(share < 2, share * UNITS, 2 * UNITS).ceil().long()  # NaN is too much, too
    fits = torch.zeros_like(keep).scatter_(1, index, units.cumsum(1) <= UNITS)
    return Choice(~fits | keep, values, weight)


def live_columns(
    setting: Setting, state: RowState, tiles: list[Tile], tolerance: float, tally: Tally
) -> list[Columns]:
    """Of a chunk of rows, whose logits are there in `tiles` of consecutive rows."""
    start, stop = tiles[0].first_row, tiles[-1].first_row + len(tiles[-1].student)
    nothing = torch.zeros((), device=state.weight.device)
    blocks = Blocks(nothing, nothing, nothing, stop - start, TILE)
    for tile in tiles:
        own = tile.own
        found = masses(setting, state, tile)
        bounded = bounds(setting, state, own, tile.measure, found, TILE)
        blocks = blocks.plus(Blocks.of(bounded, found, len(tile.student), TILE))
    choice = choose(setting, state, slice(start, stop), blocks, tolerance)
    found_runs = runs_of(choice.live[0].tolist(), TILE, setting.vocabulary)
    live = torch.zeros_like(choice.live)
    for a, b in found_runs:  # with short gaps
        live[:, a // TILE : -(-b // TILE)] = True
    tally.add(choice._replace(live=live), blocks, stop - start, setting.vocabulary)
    return found_runs


def runs_of(live: list[bool], columns: int, vocabulary: int) -> list[Columns]:
    """Tiles that are live, with the gaps between them that are short."""
    found: list[Columns] = []
    for tile, alive in enumerate(live):
        if alive:
            start, stop = tile * columns, min((tile + 1) * columns, vocabulary)
            near = bool(found) and start - found[-1][1] <= GAP * columns
            found.append((found.pop()[0] if near else start, stop))
    return found


# ---- what was left out ---------------------------------------------------------------------------


class Skipped(NamedTuple):
    skipped: Tensor  # () fp32, of the logits: those whose gradient was left out
    dropped: Tensor  # () fp32, bound on its L1 norm, for each unit of the rows' weights


class Tally:
    """Adds up what a loss leaves out."""

    def __init__(self, device: torch.device):
        self.logits, self.device = 0, device
        new = torch.zeros((), dtype=torch.float64, device=device)
        self.skipped, self.dropped, self.weight = new, new, new

    def add(self, choice: Choice, blocks: Blocks, rows: int, vocabulary: int) -> None:
        live, values, weight = choice
        heights, widths = _sizes(rows, blocks.rows, live), _sizes(vocabulary, blocks.columns, live)
        self.logits += rows * vocabulary
        self.skipped = self.skipped + (heights[:, None] * widths * ~live).sum()
        self.dropped = self.dropped + torch.where(live, 0.0, values).sum()
        self.weight = self.weight + weight.sum()

    def result(self) -> Skipped:
        if not self.logits:  # an exact loss: no work for what is 0
            return Skipped(*(torch.zeros((), device=self.device) for _ in range(2)))
        share = self.skipped / self.logits
        dropped = torch.where(self.dropped > 0, self.dropped / self.weight, 0.0)
        return Skipped(share.float(), dropped.float())


def _sizes(whole: int, step: int, like: Tensor) -> Tensor:
    """Of the parts of `whole`, the last of which may be smaller."""
    starts = torch.arange(0, whole, step, device=like.device)
    return (whole - starts).clamp(max=step)
