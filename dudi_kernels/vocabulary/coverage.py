"""Coverage: how much of what a teacher says has a place in the student, in all and by script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.vocabulary.sparse import check_weights
from dudi_kernels.vocabulary.words import script_of_token

Texts = Sequence[bytes | str | None]


class Coverage(NamedTuple):
    """Shares in [0, 1]."""

    mass: float  # of the teacher's mass, what lands on a class
    teacher_tokens: float  # of the teacher's tokens, those of which any mass does
    student_tokens: float  # of the student's tokens, those in a class
    by_script: dict[str, float]  # as `mass`, over the teacher tokens of each script


def coverage(
    mapped: Tensor,  # (U,)
    matched: Tensor,  # (V,) bool
    frequency: Tensor | None,  # (U,)
    tokens: Texts | None,
) -> Coverage:
    """See `Verbalizer.coverage`."""
    mapped = mapped.double().cpu()
    frequency = _frequency(frequency, len(mapped))
    return Coverage(
        mass=float(mapped @ frequency / frequency.sum()),
        teacher_tokens=float((mapped > 0).double().mean()),
        student_tokens=float(matched.double().mean()),
        by_script={} if tokens is None else _by_script(mapped * frequency, frequency, tokens),
    )


def _frequency(given: Tensor | None, size: int) -> Tensor:  # (U,) float64
    if given is None:
        return torch.ones(size, dtype=torch.float64)
    frequency = torch.as_tensor(given).detach().double().cpu()
    if tuple(frequency.shape) != (size,):
        raise ValueError(f"frequency must have shape ({size},), got {tuple(frequency.shape)}")
    check_weights("frequency", frequency)
    if not bool(frequency.any()):
        raise ValueError("frequency must be positive for some token, got 0 throughout")
    return frequency


def _by_script(landed: Tensor, frequency: Tensor, tokens: Texts) -> dict[str, float]:
    if len(tokens) > len(frequency):
        raise ValueError(f"tokens must be at most {len(frequency)}, got {len(tokens)}")
    scripts = [script_of_token(token) for token in tokens]
    number = {name: i for i, name in enumerate(sorted(set(scripts)))}
    index = torch.tensor([number[script] for script in scripts], dtype=torch.long)
    mass, total = (
        torch.zeros(len(number), dtype=torch.float64).index_add_(0, index, values[: len(index)])
        for values in (landed, frequency)
    )
    return {name: float(mass[i] / total[i]) for name, i in number.items() if total[i] > 0}
