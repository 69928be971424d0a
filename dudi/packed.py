"""Sequences of ids as bodies read them: signals.py packs them, known.py looks them up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Sequences of like length, right-padded for one forward pass."""

    input_ids: Tensor  # (B, T) prompt, response, padding
    attention_mask: Tensor  # (B, T)
    row_mask: Tensor  # (B, T) True where the hidden state predicts a response token


class Packed(NamedTuple):
    """Sequences in groups, and their response rows in the order of the sequences."""

    groups: tuple[Group, ...]
    order: Tensor  # (N,) place of each row among the rows of the groups, one after another
    targets: Tensor  # (N,) the response tokens, sequence by sequence
    segment_ids: Tensor  # (N,) which sequence a row belongs to

    @property
    def num_tokens(self) -> int:
        return sum(int(group.attention_mask.sum()) for group in self.groups)

    def to(self, device: torch.device | str | None) -> Packed:
        groups = tuple(Group(*(t.to(device) for t in group)) for group in self.groups)
        return Packed(groups, *(t.to(device) for t in self[1:]))
