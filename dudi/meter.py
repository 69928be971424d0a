"""Means of training metrics between two log events, over micro-batches, steps and ranks.

Each metric is a sum and a count; a log event reports sum / count over all ranks. What has gathered
since the last event can be written to a checkpoint, so a resumed run logs what one uninterrupted
run would have logged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Meter:
    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> (2,) float64 on the CPU: sum, count
        self.counting = True  # otherwise names alone are taken down, which ranks have in common

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Add `count` observations of which the sum is `total`."""
        value = float(total.detach()) if isinstance(total, Tensor) else float(total)
        entry = torch.tensor([value, float(count)], dtype=torch.float64) * self.counting
        self.sums[name] = self.sums[name] + entry if name in self.sums else entry

    def reduced(self, accelerator: Any) -> dict[str, Tensor]:
        """The sums over all ranks (every rank holds the same names)."""
        if accelerator.num_processes == 1 or not self.sums:
            return dict(self.sums)
        names = sorted(self.sums)
        stacked = torch.stack([self.sums[n] for n in names]).float().to(accelerator.device)
        return dict(zip(names, accelerator.reduce(stacked, "sum").double().cpu(), strict=True))

    def drain(self, accelerator: Any) -> dict[str, float]:
        """The means since the last drain; starts anew."""
        reduced = self.reduced(accelerator)
        self.sums = {}
        return {n: float(s[0] / s[1]) for n, s in reduced.items() if s[1] > 0}

    def state(self, accelerator: Any) -> dict[str, list[float]]:
        return {name: entry.tolist() for name, entry in self.reduced(accelerator).items()}

    def load(self, state: dict[str, list[float]], num_processes: int) -> None:
        """Take a saved state; each rank gets an equal share."""
        self.sums = {
            name: torch.tensor(entry, dtype=torch.float64) / num_processes
            for name, entry in state.items()
        }
