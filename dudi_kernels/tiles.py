"""What a sweep asks of a backend: four steps over a tile of logits, and the state of its rows.

*statistics*: log-sum-exps, on top of what earlier columns gave. *mixture*: each row's own a of an
adaptive divergence (adaptive.py); needs whole rows of logits and their log-sum-exps. *sums*:
divergence, sum of g and entropies, added to what earlier columns gave; needs the log-sum-exps of
whole rows. *gradient*: the logits become the gradient of the raw logits; needs the sums of whole
rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.divergences import FLOOR, TINY, Helpers, Measure
from dudi_kernels.head import LMHead

SERIES = 11  # terms of e^u, |u| < 1: the next one is 2e-9 beside u^2 / 2
STUDENT_POLE, TEACHER_POLE = 1, 2  # who masks a token that the other gives mass


class Steps(NamedTuple):
    statistics: bool = False
    teacher_statistics: bool = False
    mixture: bool = False
    sums: bool = False
    gradient: bool = False


class Tile(NamedTuple):
    """Some rows and consecutive columns of both sides' logits."""

    student: Tensor  # (R, B) fp32
    teacher: Tensor | None  # (R, B) fp32
    first_row: int
    first_column: int
    measure: Measure | None

    @property
    def own(self) -> slice:
        """Its rows among all."""
        return slice(self.first_row, self.first_row + len(self.student))


class Setting(NamedTuple):
    """What is the same for every tile of a sweep."""

    vocabulary: int
    targets: Tensor | None  # (N,)
    inv_tau: float
    teacher_inv_tau: float
    softcap: float | None  # the student's, and its scale: the gradient goes through them
    scale: float
    masked: bool  # whether a logit may be -inf
    tile_rows: int  # for a backend that needs temporaries

    @classmethod
    def of(
        cls,
        student: LMHead,
        teacher: LMHead | None,
        targets: Tensor | None,
        inv_taus: tuple[float, float],  # the student's, the teacher's
        tile_rows: int,
    ) -> Setting:
        """For these heads; a bias is where -inf comes from. Of a vocabulary that ranks share, this
        rank's rows are all there is."""
        if targets is not None and student.shard is not None:
            targets = student.shard.local(targets)
        return cls(
            vocabulary=student.vocab_size,
            targets=targets,
            inv_tau=inv_taus[0],
            teacher_inv_tau=inv_taus[1],
            softcap=student.softcap,
            scale=student.scale,
            masked=any(head is not None and head.bias is not None for head in (student, teacher)),
            tile_rows=tile_rows,
        )


@dataclass
class RowState:
    """Per row (N,): statistics, sums, and the coefficients of the gradient; fp32 but for the
    log-sum-exps, which are float64 where the device has it: the logits of a row can be large."""

    log_sum: Tensor
    tempered_log_sum: Tensor
    teacher_log_sum: Tensor
    teacher_tempered_log_sum: Tensor
    target: Tensor  # logit
    teacher_target: Tensor
    divergence: Tensor
    g_sum: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    poles: Tensor  # int32 bits
    weight: Tensor  # d loss / d divergence
    coefficient: Tensor | None = None  # d loss / d log_prob
    entropy_weight: Tensor | None = None  # d loss / d entropy
    mixture: Tensor | None = None  # a of an adaptive divergence

    @classmethod
    def fresh(cls, weight: Tensor) -> RowState:
        """Before the first step."""
        weight, new = weight.float().contiguous(), torch.zeros_like
        wide = torch.float32 if weight.device.type == "mps" else torch.float64

        def log_sum() -> Tensor:
            return torch.full_like(weight, -torch.inf, dtype=wide)

        return cls(
            log_sum=log_sum(),
            tempered_log_sum=log_sum(),
            teacher_log_sum=log_sum(),
            teacher_tempered_log_sum=log_sum(),
            target=new(weight),
            teacher_target=new(weight),
            divergence=new(weight),
            g_sum=new(weight),
            entropy=new(weight),
            teacher_entropy=new(weight),
            poles=new(weight, dtype=torch.int32),
            weight=weight,
        )

    def rows(self, start: int, stop: int) -> RowState:
        """Views of some rows."""
        views = {k: v[start:stop] for k, v in vars(self).items() if v is not None}
        return replace(self, **views)

    @property
    def log_prob(self) -> Tensor:
        return (self.target - self.log_sum).float()

    @property
    def teacher_log_prob(self) -> Tensor:
        return (self.teacher_target - self.teacher_log_sum).float()


def log_probs(logits: Tensor, log_sum: Tensor, inv_tau: float, masked: bool) -> Tensor:
    """Taking the log-sum-exp off in two floats keeps a log-probability as exact as its logit."""
    high = log_sum.float()
    low = (log_sum - high).masked_fill(high.isinf(), 0).float()
    scaled = logits if inv_tau == 1.0 else logits * inv_tau
    values = (scaled - high[:, None]).sub_(low[:, None])
    return values.clamp_(min=FLOOR) if masked else values


def slope(logits: Tensor, setting: Setting) -> Tensor | float | None:
    """d logit / d raw logit through softcap and scale; None is 1."""
    if setting.softcap is None:
        return setting.scale if setting.scale != 1.0 else None
    capped = logits / (setting.softcap * setting.scale)
    if setting.masked:  # past the cap
        capped.masked_fill_(logits == -torch.inf, 0)
    return capped.square_().neg_().add_(1).mul_(setting.scale)


def helpers(
    measure: Measure, p: Tensor, lp: Tensor, q: Tensor, lq: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x, y and z of a divergence."""
    match measure.helpers:
        case Helpers.NONE:
            return None, None, None
        case Helpers.MIXTURE:
            mixture = torch.lerp(q, p, measure.a).clamp_(min=TINY)
            return mixture, mixture.log(), None
        case Helpers.POWERS:
            a, b, gap = measure.a, measure.b, lp - lq
            cross = (a * lp + b * lq).exp()
            y = remainder(b * gap, ((a + b) * lp).exp(), cross, gap, b)
            q_power = ((a + b) * lq).exp()
            z = remainder(-a * gap, q_power, cross, gap, -a)
            near = z - cross * gap * a
            return torch.where((a * gap).abs() < 1, near, q_power - cross), y, z


def remainder(u: Tensor, power: Tensor, cross: Tensor, gap: Tensor, rate: float) -> Tensor:
    """power - cross (1 + u), power = cross e^u and u = rate gap: by series where it cancels."""
    series = torch.ones_like(u)
    for k in range(SERIES, 2, -1):
        series.mul_(u).div_(k).add_(1)
    series.mul_(u).mul_(u).mul_(0.5).mul_(cross)
    return torch.where(u.abs() < 1, series, power - cross - cross * gap * rate)  # no 0 * inf


def smooth_mask(measure: Measure) -> int:
    """The poles at which the gradient does not exist."""
    return STUDENT_POLE * measure.student_masks.g + TEACHER_POLE * measure.teacher_masks.g


def infinite_mask(measure: Measure) -> int:
    """The poles at which the divergence is infinite."""
    return STUDENT_POLE * measure.student_masks.phi + TEACHER_POLE * measure.teacher_masks.phi
