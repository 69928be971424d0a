"""A teacher that is known by its k likeliest tokens alone, as caches and servers give it.

The divergence is over k + 1 classes: the k tokens, and one bucket with the rest of the vocabulary,
whose mass is exact on both sides; to adaptive_kl it is of the tail. The student's logits are made
as ever; a row's top logits are taken out of its buffer, so that the statistics of what stays are
the bucket's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.adaptive import forward_share
from dudi_kernels.divergences import FLOOR, TINY, Measure
from dudi_kernels.scalars import INTEGERS
from dudi_kernels.sweep import Chunk, Needs, RowValues, Side, new_gradients
from dudi_kernels.tiles import (
    STUDENT_POLE,
    TEACHER_POLE,
    RowState,
    Setting,
    Steps,
    Tile,
    helpers,
    infinite_mask,
    slope,
    smooth_mask,
)

SLACK = 1e-3  # by which rounded probabilities may sum to more than 1


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """The k likeliest tokens of each row and their log-probabilities.

    Args:
        ids: (..., k) int64, no token twice in a row.
        log_probs: (..., k) nats, at the temperature that the student is to be compared at.

    Raises:
        TypeError, ValueError: shapes or types that don't fit; log-probabilities that are positive,
            NaN, or sum to more than 1; a token twice in a row.
    """

    ids: Tensor
    log_probs: Tensor

    def __post_init__(self) -> None:
        for name in ("ids", "log_probs"):
            if not isinstance(value := getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if self.ids.dtype not in INTEGERS or not self.log_probs.is_floating_point():
            got = f"{self.ids.dtype} and {self.log_probs.dtype}"
            raise TypeError(f"ids must be integers and log_probs floating-point, got {got}")
        if self.ids.shape != self.log_probs.shape or self.ids.ndim < 2 or not self.ids.shape[-1]:
            raise ValueError(
                "ids and log_probs must have one shape (..., k) with k > 0, got "
                f"{tuple(self.ids.shape)} and {tuple(self.log_probs.shape)}"
            )
        if torch.compiler.is_compiling():  # the operator makes it again, and checks the values
            return
        ordered = self.ids.flatten(0, -2).sort(-1).values
        if bool((twice := (ordered[:, 1:] == ordered[:, :-1]).any(-1)).any()):
            raise ValueError(f"ids must not name a token twice, row {int(twice.nonzero()[0])} does")
        total = self.log_probs.detach().double().exp().sum(-1).flatten()
        wrong = ~((self.log_probs.flatten(0, -2) <= SLACK).all(-1) & (total <= 1 + SLACK))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"log_probs must be those of at most all the mass, row {row} sums to {total[row]}"
            )


class TopKTask(NamedTuple):
    """What a sweep with such a teacher computes."""

    student: Side
    ids: Tensor  # (N, k)
    log_probs: Tensor  # (N, k) float64
    measure: Measure
    targets: Tensor | None  # (N,)
    weight: Tensor  # (N,) of the divergence
    coefficient: Tensor  # (N,) d loss / d log_prob
    chunks: list[Chunk]
    tile_rows: int
    needs: Needs


class TopKSweep:
    """*retain* over chunks of rows."""

    def __init__(self, task: TopKTask, backend: ModuleType):
        self.task, self.backend = task, backend
        head = task.student.head
        largest = max((b - a for a, b in task.chunks), default=0)
        shape, device = (largest, head.vocab_size), task.weight.device
        self.logits = torch.empty(shape, dtype=torch.float32, device=device)
        self.state = RowState.fresh(task.weight)
        self.state.coefficient = torch.zeros_like(self.state.weight)
        setting = Setting.of(head, None, None, (1.0, 1.0), task.tile_rows)
        self.setting = setting._replace(masked=True)  # what is taken out of a row is -inf
        self.grads = new_gradients(task.student, task.needs)
        self.log_prob = torch.zeros_like(self.state.weight)

    def run(self) -> RowValues:
        for i, (start, stop) in enumerate(self.task.chunks):
            self._chunk(start, stop, filled=i > 0)
        if self.grads.weight is not None and not self.task.chunks:
            self.grads.weight.zero_()
        state = self.state
        nothing = torch.zeros_like(self.log_prob)
        return RowValues(
            state.divergence, self.log_prob, state.entropy, state.teacher_entropy, nothing
        )

    def _chunk(self, start: int, stop: int, filled: bool) -> None:
        task, rows = self.task, slice(start, stop)
        side, ids = task.student.rows(start, stop), task.ids[rows]
        logits = self.backend.project(side, self.logits[: stop - start])
        top = logits.gather(1, ids)
        target = None if task.targets is None else logits.gather(1, task.targets[rows, None])
        logits.scatter_(1, ids, -torch.inf)
        tile = Tile(logits, None, start, 0, None)
        self.backend.steps(self.setting, self.state, tile, Steps(statistics=True))
        log_q = self._log_classes(top, rows)
        self.backend.steps(self.setting, self.state, tile, Steps(sums=True))
        top_values, of_rest = self._classes(log_q, rows)
        if target is not None:
            self.log_prob[rows] = (target[:, 0] - self.state.log_sum[rows]).float()
        if not any(task.needs):
            return
        coefficient = task.coefficient[rows]
        assert self.state.coefficient is not None
        self.state.coefficient[rows] = coefficient - of_rest
        self.backend.steps(self.setting, self.state, tile, Steps(gradient=True))
        own = top_values - coefficient[:, None] * log_q[:, :-1].exp().float()
        logits.scatter_(1, ids, own * self._slope(top))
        if target is not None and task.targets is not None:
            pull = coefficient[:, None] * self._slope(target)
            logits.scatter_add_(1, task.targets[rows, None], pull)
        self.backend.accumulate(logits, side, self.grads.rows(start, stop), filled)

    def _log_classes(self, top: Tensor, rows: slice) -> Tensor:
        """(R, k + 1) float64 log-probabilities of the student's classes; the whole log-sum-exp."""
        rest = self.state.log_sum[rows].clone()
        whole = torch.logaddexp(rest, torch.logsumexp(top.to(rest.dtype), 1))
        self.state.log_sum[rows] = whole
        classes = torch.cat([top.to(rest.dtype), rest[:, None]], 1)
        return (classes - whole[:, None]).clamp_(min=FLOOR)

    def _classes(self, lq: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The divergence over the classes; the gradient of the top logits, and of the others by
        their own probability."""
        task, measure = self.task, self.task.measure
        lp = task.log_probs[rows].to(lq.dtype)
        rest = (1 - lp.exp().sum(1, keepdim=True)).clamp_(min=0).log()
        if lp.shape[1] == task.student.head.vocab_size:  # the bucket is empty: rounding, no mass
            rest.fill_(FLOOR)
        lp = torch.cat([lp, rest], 1).clamp_(min=FLOOR)
        p, q = lp.exp(), lq.exp()
        a = forward_share(p, q, tail=1)[:, None] if measure.adaptive else measure.a
        phi, g = measure.terms(p, lp, q, lq, *helpers(measure, p, lp, q, lq), a, measure.b)
        poles = STUDENT_POLE * ((lq <= FLOOR) & (p > 0)).any(1)
        poles += TEACHER_POLE * ((lp <= FLOOR) & (q > 0)).any(1)
        infinite, rough = ((poles & m(measure)) != 0 for m in (infinite_mask, smooth_mask))
        self.state.divergence[rows] = phi.sum(1).masked_fill(infinite, torch.inf).float()
        g = g.masked_fill(rough[:, None], 0)  # no gradient where there is none
        g_sum, weight = g.sum(1, keepdim=True), task.weight[rows, None]
        self.state.teacher_entropy[rows] = -(p * lp).sum(1).float()
        self.state.entropy[rows] -= (q[:, :-1] * lq[:, :-1]).sum(1).float()
        by_mass = weight * (g / q.clamp(min=TINY) - g_sum)
        return (by_mass * q)[:, :-1].float(), by_mass[:, -1].float()

    def _slope(self, logits: Tensor) -> Tensor | float:
        found = slope(logits, self.setting)
        return 1.0 if found is None else found
