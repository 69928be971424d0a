"""Expected calibration error, arXiv 1706.04599: how far confidence is from being right.

Confidences fall into BINS bins of equal width; ECE is the mean over predictions of |share that is
right - mean confidence| of their bin. A row keeps three sums for each bin that it has anything in,
so that a resample needs nothing but sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dudi.intervals import or_none

BINS = 15
Bins = list[list[float | None]]  # [bin, predictions, summed confidence, right ones]


def binned(confidence: Tensor, right: Tensor) -> Bins:
    """Of predictions (R,): the bins that are not empty; a sum that is not finite is None."""
    places = (confidence.double() * BINS).nan_to_num(0).long().clamp(0, BINS - 1)
    sums = torch.zeros(BINS, 3, dtype=torch.float64)
    ones = torch.ones(len(confidence), dtype=torch.float64)
    sums.index_add_(0, places, torch.stack([ones, confidence.double(), right.double()], 1))
    return [[i, *map(or_none, values)] for i, values in enumerate(sums.tolist()) if values[0]]


def spread(bins: Sequence[Sequence[float | None]]) -> np.ndarray:  # (3 BINS,)
    """Sums of all bins, one after another."""
    out = np.zeros((BINS, 3))
    for place, *values in bins:
        assert place is not None
        out[int(place)] = values  # None is NaN
    return out.ravel()


def ece(sums: np.ndarray) -> np.ndarray:  # (B, 3 BINS) -> (B,)
    """sum over bins of (n / N) |right / n - confidence / n|, NaN without a prediction."""
    n, confidence, right = np.moveaxis(sums.reshape(len(sums), BINS, 3), 2, 0)
    with np.errstate(invalid="ignore"):
        return np.abs(right - confidence).sum(1) / n.sum(1)
