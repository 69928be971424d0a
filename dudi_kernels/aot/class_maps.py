"""The kernels between tokens and classes (backends/triton/maps.py), as they would be launched.

They see fp32 logits whatever the inputs are, and no divergence; one compilation for each number of
members that a group of classes may have, with weights and without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dudi_kernels.aot.compile import LOGITS_ROWS, Launch, recorded
from dudi_kernels.aot.targets import Gpu, Shape
from dudi_kernels.backends.triton import maps
from dudi_kernels.classes import Classes, Group, Shared

BUCKET = 2**16  # members
WIDTHS = (*(2**i for i in range(maps.WIDEST.bit_length())), BUCKET)


def compile_maps(gpu: Gpu, shape: Shape) -> list[Launch]:
    """For a teacher and a student with as many tokens each."""
    tokens = shape.vocabulary
    logits = torch.empty(LOGITS_ROWS, tokens, device="meta")
    of_classes, out = torch.empty_like(logits), torch.empty_like(logits)
    groups = [_group(tokens, width, weighted) for width in WIDTHS for weighted in (False, True)]
    ids = torch.empty(tokens, dtype=torch.int64, device="meta")
    shared = Shared(ids, ids)
    classes = Classes(
        size=tokens,
        teacher=tuple(groups),
        student=(),
        student_class=ids,
        shared=shared,
        excluded=ids[:0],
        places=ids,
        masked=False,
        prefix=False,
    )
    with recorded(gpu) as found:
        maps.class_logits(groups, logits, 1.0, of_classes)
        maps.shares(shared, logits, 1.0, of_classes, out)
        maps.pull(classes, of_classes, out, 1.0, logits)
    return found


def _group(tokens: int, width: int, weighted: bool) -> Group:
    count = max(1, tokens // width)

    def meta(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    return Group(
        meta(count, dtype=torch.int64),
        meta(count, width, dtype=torch.int64),
        meta(count, width, dtype=torch.float32) if weighted else None,
    )
