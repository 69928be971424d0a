"""From a Verbalizer to index tables: the classes that a divergence is over, and their members.

Every class has members on both sides. Tokens of the student without any form one class more, the
bucket, which the mass that the teacher puts nowhere else belongs to; or they stay out of both
distributions. A side's classes are grouped by their number of members, padded to a power of two,
so that the cost of a group follows its own multiplicity; nothing is ever summed by atomics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dudi_kernels.plan import ClassSizes

if TYPE_CHECKING:
    from dudi_kernels.verbalizer import Verbalizer

GATHERED = 3  # times as many elements as a group's members alive at once, at the most
ALONE, NOWHERE = -1, -2  # places of tokens that share no class, or have none
LEAST = 1e-6  # of a token's mass: less is the rounding of weights that sum to 1


class Group(NamedTuple):
    """Classes of up to W members."""

    classes: Tensor  # (G,) int64
    members: Tensor  # (G, W) int64
    log_weights: Tensor | None  # (G, W) fp32, -inf where there is no member; None: zeros

    @property
    def width(self) -> int:
        return self.members.shape[1]


class Shared(NamedTuple):
    """The student's tokens that share their class with others."""

    tokens: Tensor  # (n,) int64
    classes: Tensor  # (n,) int64


class Classes(NamedTuple):
    """What a sweep needs of a verbalizer, on its device."""

    size: int  # K
    teacher: tuple[Group, ...]
    student: tuple[Group, ...]
    student_class: Tensor  # (V,) int64, 0 for a token without one
    shared: Shared
    excluded: Tensor  # tokens without a class
    places: Tensor  # (V,) in `shared`, or ALONE, or NOWHERE
    masked: bool  # whether the teacher gives a class no mass: the bucket
    prefix: bool  # whether the student's tokens are the teacher's first, each a class

    def sizes(self, teacher_size: int, temporaries: bool) -> ClassSizes:
        """What a plan must know of them; whether gathering takes temporaries."""
        largest = max(group.members.numel() for group in (*self.teacher, *self.student))
        return ClassSizes(teacher_size, self.size, GATHERED * largest * temporaries)

    @classmethod
    def of(cls, verbalizer: Verbalizer) -> Classes:
        """Raises: ValueError where the two sides have no class in common."""
        ids, classes, weights, student, size, masked = _live(verbalizer)
        excluded = (student < 0).nonzero()[:, 0]
        own = (student >= 0).nonzero()[:, 0]
        sizes = torch.bincount(student[own], minlength=size)
        shared = own[sizes[student[own]] > 1]
        places = torch.full_like(student, ALONE).index_fill(0, excluded, NOWHERE)
        places[shared] = torch.arange(len(shared), device=places.device)
        ones = torch.ones(len(own), dtype=weights.dtype, device=weights.device)
        return cls(
            size=size,
            teacher=_groups(ids, classes, weights, size),
            student=_groups(own, student[own], ones, size),
            student_class=student.clamp(min=0),
            shared=Shared(shared, student[shared]),
            excluded=excluded,
            places=places,
            masked=masked,
            prefix=verbalizer.prefix_size == verbalizer.student_size,
        )


class _Live(NamedTuple):
    """Entries of the teacher's map, and the student's partition."""

    ids: Tensor
    classes: Tensor
    weights: Tensor  # float64
    student: Tensor  # (V,) -1: none
    size: int
    masked: bool


def _live(verbalizer: Verbalizer) -> _Live:
    """The classes that both sides have, numbered anew, and the bucket."""
    v, classes, weights = verbalizer, verbalizer.entry_class, verbalizer.weights.double()
    live = torch.bincount(classes, minlength=v.num_classes) > 0
    count = int(live.sum())
    if not count:
        raise ValueError("verbalizer must give a class that the student has some mass, got none")
    number = live.cumsum(0) - 1
    student = torch.where(v.matched, number[v.student_class.clamp(min=0)], -1)
    found = _Live(v.teacher_ids, number[classes], weights, student, count, False)
    if v.unmatched == "bucket" and not bool(v.matched.all()):
        return _with_bucket(found, 1 - v.columns.row_sums(v.teacher_size))
    return found


def _with_bucket(live: _Live, rest: Tensor) -> _Live:  # (U,) mass that has no class
    tokens = (rest > LEAST).nonzero()[:, 0]
    return _Live(
        ids=torch.cat([live.ids, tokens]),
        classes=torch.cat([live.classes, torch.full_like(tokens, live.size)]),
        weights=torch.cat([live.weights, rest[tokens]]),
        student=live.student.masked_fill(live.student < 0, live.size),
        size=live.size + 1,
        masked=not len(tokens),
    )


def _groups(ids: Tensor, classes: Tensor, weights: Tensor, count: int) -> tuple[Group, ...]:
    """Members of each class, by the power of two that holds their number."""
    order = torch.argsort(classes, stable=True)
    ids, weights = ids[order], weights[order]
    sizes = torch.bincount(classes, minlength=count)
    starts = sizes.cumsum(0) - sizes
    widths = 2 ** (sizes - 1).clamp(min=0).double().log2().floor().add(1).long()
    widths = torch.where(sizes > 1, widths, 1)
    groups = []
    for width in sorted(set(widths.tolist())):
        own = ((widths == width) & (sizes > 0)).nonzero()[:, 0]
        if not len(own):
            continue
        place = torch.arange(width, device=ids.device)
        there = place < sizes[own, None]
        at = torch.where(there, starts[own, None] + place, starts[own, None])
        log_weights = weights[at].log().float().masked_fill(~there, -torch.inf)
        plain = bool((log_weights == 0).all())
        groups.append(Group(own, ids[at], None if plain else log_weights))
    return tuple(groups)
