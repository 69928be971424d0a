"""An estimate of FSDP2: what stays is divided by the ranks, and some weights are whole for a while.

Gathered at a time are a model's blocks two by two (one computes, the next one comes) and what lies
outside of blocks (embedding, head), and in the backward pass the gradients of one block.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dudi.planning.phases import GRADIENTS, STATES
from dudi.signals import causal_lm

DIVIDED = ("student weights", "teacher weights", "reference copy", STATES, GRADIENTS)
GATHERED = "gathered weights and gradients"


def sharded(parts: dict[str, int], models: list[Any], ranks: int) -> dict[str, int]:
    """Bytes by part on one of `ranks`, from those where each rank has all."""
    if ranks == 1:
        return parts
    held = {p: -(-size // ranks) if p in DIVIDED else size for p, size in parts.items()}
    gathered = sum(_outside(model) + 2 * _largest_block(model) for model in models)
    if GRADIENTS in parts:
        gathered += _largest_block(models[0])
    return held | {GATHERED: gathered}


def _blocks(model: Any) -> list[nn.Module]:
    """The layers of the longest list of modules."""
    lists = [list(m) for m in causal_lm(model).modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _largest_block(model: Any) -> int:
    return max(map(_bytes, _blocks(model)), default=0)


def _outside(model: Any) -> int:
    return _bytes(model) - sum(map(_bytes, _blocks(model)))
