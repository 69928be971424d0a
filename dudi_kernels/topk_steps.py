"""Steps over rows that are compared with a teacher's k likeliest tokens (topk.py).

The divergence is over k + 1 classes: the k tokens, and one bucket with the rest of the vocabulary,
whose mass is exact on both sides; to adaptive_kl it is of the tail. A row's top logits are taken
out of its buffer, and a backend's steps take what stays as if it were all there is: its log-sum-exp
is the bucket's, its entropy and its gradient count by the bucket's mass.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.adaptive import forward_share
from dudi_kernels.divergences import FLOOR, Measure
from dudi_kernels.tiles import (
    STUDENT_POLE,
    TEACHER_POLE,
    RowState,
    Setting,
    Steps,
    Tile,
    helpers,
    slope,
    smooth_mask,
)
from dudi_kernels.topk import Top

TAKEN = FLOOR / 2  # in the place of what is taken out: no mass, and to the steps no mask


class Compared(NamedTuple):
    """Some rows' classes, the bucket last, in the precision of log-sum-exps."""

    p: Tensor  # (R, k + 1)
    lp: Tensor
    q: Tensor
    lq: Tensor
    phi: Tensor
    g: Tensor
    poles: Tensor  # (R,) bits
    silent: Tensor  # (R, 1) whether nothing is known


class TopKSteps:
    """The steps over rows that are compared with such a teacher."""

    masked = True  # a class may have no mass

    def __init__(
        self,
        top: Top,
        backend: ModuleType,
        setting: Setting,  # of the tokens
        state: RowState,  # of all rows
    ):
        self.top, self.backend, self.state = top, backend, state
        self.targets = setting.targets
        self.setting = setting._replace(targets=None)
        self.rest = RowState.fresh(state.weight)  # as if the bucket were all there is
        self.rest.coefficient = torch.zeros_like(self.rest.weight)

    def steps(self, tile: Tile, wanted: Steps) -> None:
        """Take the wanted steps over a tile of whole rows, in place."""
        assert tile.measure is not None
        rows, logits = tile.own, tile.student
        ids = self.top.ids[rows]
        own = logits.gather(1, ids)
        if wanted.statistics and self.targets is not None:
            self.state.target[rows] = logits.gather(1, self.targets[rows, None])[:, 0]
        logits.scatter_(1, ids, TAKEN)
        early = Steps(statistics=wanted.statistics, sums=wanted.sums)
        if any(early):
            self.backend.steps(self.setting, self.rest, tile._replace(measure=None), early)
        if wanted.statistics:
            of_top = own.to(self.rest.log_sum.dtype).logsumexp(1)
            self.state.log_sum[rows] = torch.logaddexp(self.rest.log_sum[rows], of_top)
        if wanted.sums or wanted.gradient:
            found = self._compare(own, rows, tile.measure)
            if wanted.sums:
                self._set_sums(found, rows)
            if wanted.gradient:
                return self._gradient(tile, own, found)
        logits.scatter_(1, ids, own)

    # ---- classes ---------------------------------------------------------------------------------

    def _compare(self, own: Tensor, rows: slice, measure: Measure) -> Compared:
        lq, (lp, silent) = self._student(own, rows), self._teacher(rows)
        p, q = lp.exp(), lq.exp()
        a = forward_share(p, q, tail=1)[:, None] if measure.adaptive else measure.a
        phi, g = measure.terms(p, lp, q, lq, *helpers(measure, p, lp, q, lq), a, measure.b)
        poles = STUDENT_POLE * ((lq <= FLOOR) & (p > 0)).any(1)
        poles += TEACHER_POLE * ((lp <= FLOOR) & (q > 0)).any(1)
        phi, g = phi.masked_fill(silent, 0), g.masked_fill(silent, 0)
        return Compared(p, lp, q, lq, phi, g, poles.masked_fill(silent[:, 0], 0), silent)

    def _student(self, own: Tensor, rows: slice) -> Tensor:
        whole, rest = self.state.log_sum[rows, None], self.rest.log_sum[rows, None]
        rest = rest.masked_fill(rest < TAKEN / 2, -torch.inf)  # nothing stays
        return (torch.cat([own.to(rest.dtype), rest], 1) - whole).clamp_(min=FLOOR)

    def _teacher(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The log-probabilities, and whether there are none."""
        known = self.top.log_probs[rows].to(self.rest.log_sum.dtype)
        rest = (1 - known.exp().sum(1, keepdim=True)).clamp_(min=0).log()
        if known.shape[1] == self.setting.vocabulary:  # the bucket is empty: rounding, no mass
            rest.fill_(FLOOR)
        silent = (known == -torch.inf).all(1, keepdim=True)
        return torch.cat([known, rest], 1).clamp_(min=FLOOR), silent

    def _set_sums(self, found: Compared, rows: slice) -> None:
        state = self.state
        state.divergence[rows] = found.phi.sum(1).float()
        state.poles[rows] = found.poles.int()
        entropy = -(found.p * found.lp).sum(1, keepdim=True)
        state.teacher_entropy[rows] = entropy.masked_fill(found.silent, 0)[:, 0].float()
        inside = found.q[:, -1] * self.rest.entropy[rows]
        state.entropy[rows] = (inside - (found.q * found.lq).sum(1)).float()

    # ---- gradient --------------------------------------------------------------------------------

    def _gradient(self, tile: Tile, own: Tensor, found: Compared) -> None:
        """Of the bucket by the backend, then of the target, and of the top, which it may be in."""
        assert tile.measure is not None and self.rest.coefficient is not None
        rows, logits, ids = tile.own, tile.student, self.top.ids[tile.own]
        pull = self._pull(found, rows, tile.measure)
        of_top, of_rest = pull[:, :-1], pull[:, -1:]
        if (coefficient := self._coefficient(rows)) is not None:
            q = found.q[:, :-1]
            if self.targets is not None:
                inside = ids == self.targets[rows, None]
                q = torch.where(inside, found.lq[:, :-1].expm1(), q)
            of_top = of_top - coefficient * q
            pull = of_rest - coefficient * found.q[:, -1:]
        self.rest.coefficient[rows] = -pull[:, -1].float()
        logits.scatter_(1, ids, -torch.inf)  # past a softcap
        bucket = tile._replace(measure=None)
        self.backend.steps(self.setting, self.rest, bucket, Steps(gradient=True))
        if coefficient is not None and self.targets is not None:
            logit = self.state.target[rows, None]
            share = (logit - self.rest.log_sum[rows, None]).exp()
            surprise = (logit - self.state.log_sum[rows, None]).expm1()  # q - 1
            of_target = (of_rest * share - coefficient * surprise).float()
            logits.scatter_(1, self.targets[rows, None], of_target * self._slope(logit))
        logits.scatter_(1, ids, of_top.float() * self._slope(own))

    def _pull(self, found: Compared, rows: slice, measure: Measure) -> Tensor:
        """(R, k + 1) the divergence's gradient in the classes' log-masses."""
        rough = (found.poles & smooth_mask(measure)) != 0
        g = found.g.masked_fill(rough[:, None], 0)  # no gradient where there is none
        return self.state.weight[rows, None] * (g - found.q * g.sum(1, keepdim=True))

    def _coefficient(self, rows: slice) -> Tensor | None:
        own = self.state.coefficient
        return None if own is None else own[rows, None].to(self.rest.log_sum.dtype)

    def _slope(self, logits: Tensor) -> Tensor | float:
        found = slope(logits, self.setting)
        return 1.0 if found is None else found
