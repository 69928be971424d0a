"""Which numbers an argument may be; a refusal names it, what was wanted and what came."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch

LARGEST = sys.float_info.max  # an int may be larger
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# Bounds within which inverses and products, also with logits, are finite and not 0 in fp32.
TEMPERATURES = (1e-9, 1e9)
SCALES = (1e-15, 1e15)  # of logits, and softcaps
POWERS = (1e-3, 1e3)  # of probabilities
SHARES = (1e-6, 1 - 1e-6)  # of mixtures: below, 1 - share is 1


def number(name: str, value: Any, low: float, high: float, ends: bool = True) -> float:
    """Within [low, high], or (low, high) without its ends; by comparisons alone, which dynamo can
    trace for a number that changes."""
    own = float(value) if isinstance(value, Real) and not isinstance(value, float | int) else value
    known = isinstance(own, float | int) and not isinstance(own, bool)
    if not known or not -LARGEST <= own <= LARGEST:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    inside = low <= own <= high if ends else low < own < high
    if not inside:
        left, right = "[]" if ends and math.isfinite(high) else "[)" if ends else "()"
        raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {value}")
    return float(own)


def integer(name: str, value: object, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)
