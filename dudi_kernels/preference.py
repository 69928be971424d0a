"""The sequence-level preference: how rows are packed into responses, and what a pair's scores cost.

A prompt's response y+ is compared with each of its samples y-. Everything here is on sequences,
(S,), and pairs, (P,): their sums come from a sweep's log-probabilities, and what comes back is a
coefficient for each row, d loss / d log q[target].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kind(NamedTuple):
    """A loss of z = r(y+) - r(y-), less the margin, and its slope d loss / d z."""

    value: Callable[[Tensor, float], Tensor]  # of z and beta
    slope: Callable[[Tensor, float], Tensor]


PREFERENCES = {
    "sigmoid": Kind(  # DPO, arXiv 2305.18290; SPIN, 2401.01335
        lambda z, beta: -F.logsigmoid(beta * z),
        lambda z, beta: -beta * torch.sigmoid(-beta * z),
    ),
    "hinge": Kind(  # SLiC-HF, arXiv 2305.10425
        lambda z, beta: F.relu(1 - beta * z),
        lambda z, beta: -beta * (beta * z < 1).to(z.dtype),
    ),
    "ipo": Kind(  # arXiv 2310.12036
        lambda z, beta: (z - 1 / (2 * beta)).square(),
        lambda z, beta: 2 * z - 1 / beta,
    ),
}


class Packing(NamedTuple):
    """Rows packed as [y+; y-; ...; y-] [y+; y-; ...; y-] ..., as many y- for each prompt."""

    segments: Tensor  # (N,) group i for y+ of prompt i, then each y-
    sequences: int  # S
    starts: list[int]  # (S + 1) row offsets of the segments
    group: int = 2  # sequences of a prompt

    @property
    def positive(self) -> Tensor:
        return self.segments % self.group == 0

    @property
    def pairs(self) -> int:
        return self.sequences // self.group * (self.group - 1)

    @property
    def positives(self) -> int:
        """Rows of y+."""
        return sum(b - a for a, b in list(pairwise(self.starts))[:: self.group])

    def side(self, segment: int) -> int:
        """0 of a y+, 1 of a y-."""
        return int(segment % self.group > 0)

    def sums(self, values: Tensor) -> Tensor:
        """(S,) of the rows of each segment."""
        return values.new_zeros(self.sequences).index_add(0, self.segments, values)

    def differences(self, scores: Tensor) -> Tensor:  # (S,) -> (P,)
        """Of y+ and each of its y-."""
        by_prompt = scores.view(-1, self.group)
        return (by_prompt[:, :1] - by_prompt[:, 1:]).reshape(-1)

    def by_sequence(self, pull: Tensor) -> Tensor:  # (P,) -> (S,)
        """What pairs pull at: y+ towards one side, y- to the other."""
        by_prompt = pull.view(-1, self.group - 1)
        return torch.cat([by_prompt.sum(1, keepdim=True), -by_prompt], 1).view(-1)

    def part(self, start: int, stop: int) -> tuple[Packing, slice]:
        """The prompts of rows [start, stop), and their segments."""
        own, step = self.segments[start:stop], self.group
        first = next(s for s in range(0, self.sequences, step) if self.starts[s + step] > start)
        last = next(s for s in range(first, self.sequences, step) if self.starts[s + step] >= stop)
        whole = slice(first, last + step)
        return Packing(own - first, last + step - first, [], step), whole


class Preference(NamedTuple):
    """kind(r(y+) - r(y-) - margin / beta), r(y) = (log pi - log pi_ref) scale."""

    packing: Packing
    reference: Tensor  # (S,) log-probabilities, unless they are the teacher's
    from_teacher: bool
    kind: Kind
    beta: float
    margin: float
    scale: Tensor  # (S,) 1 / |y|^a
    weight: float | Tensor  # of a pair in the loss

    def margins(
        self, log_prob: Tensor, teacher_log_prob: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # (P,), (S,), (S,)
        """r(y+) - r(y-), and the sums that it comes from."""
        sums = self.packing.sums(log_prob)
        reference = self.packing.sums(teacher_log_prob) if self.from_teacher else self.reference
        return self.packing.differences((sums - reference) * self.scale), sums, reference

    def loss(self, margins: Tensor) -> Tensor:  # (P,)
        return self.kind.value(margins - self.margin / self.beta, self.beta)

    def coefficients(
        self, start: int, stop: int, log_prob: Tensor, teacher_log_prob: Tensor | None
    ) -> Tensor:
        """(R,) d loss / d log q[target] of the rows of whole prompts."""
        packing, whole = self.packing.part(start, stop)
        scale = self.scale[whole]
        own = self._replace(packing=packing, reference=self.reference[whole], scale=scale)
        other = log_prob if teacher_log_prob is None else teacher_log_prob
        margins, _, _ = own.margins(log_prob, other)
        pull = self.kind.slope(margins - self.margin / self.beta, self.beta) * self.weight
        pull = torch.where(pull.isfinite(), pull, 0)  # targets that are masked
        return (packing.by_sequence(pull) * scale)[packing.segments]
