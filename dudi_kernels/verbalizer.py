from __future__ import annotations
from dataclasses import dataclass
from functools import cached_property
import torch
from torch import Tensor
from dudi_kernels.classes import Classes


@dataclass(frozen=True, eq=False)
class Verbalizer:
    teacher_size: int
    student_size: int
    num_classes: int
    indptr: Tensor
    teacher_ids: Tensor
    weights: Tensor
    student_class: Tensor
    unmatched: str = "bucket"

    @cached_property
    def classes(self) -> Classes:
        return Classes.of(self)
