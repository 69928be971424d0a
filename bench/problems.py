"""The shapes that are measured, and tensors for them.

Published shapes of real pairs of models, with hidden states and weights drawn so that each row has
a likely token, as a language model's has; `smollm2` has the real ones of SmolLM2-135M on
the embedded strings, the teacher being the model itself and the student a noisy copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    vocab_size: int
    width: int
    teacher_width: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.rows}"


QWEN = Shape("qwen2.5", 512, 151_936, 896, 2048, "Qwen2.5 0.5B from 3B")
GEMMA = Shape("gemma3", 512, 262_144, 640, 1152, "Gemma 3 270M from 1B")
LLAMA = Shape("llama3.2", 512, 128_256, 2048, 3072, "Llama 3.2 1B from 3B")
SMOLLM2 = Shape("smollm2", 512, 49_152, 576, 576, "SmolLM2-135M, its own hidden states")
TINY = Shape("tiny", 48, 3000, 32, 48, "to see that everything runs")
SHAPES = (QWEN, GEMMA, LLAMA, SMOLLM2)
BY_NAME = {shape.name: shape for shape in (*SHAPES, TINY)}


def resized(shape: Shape, rows: int | None = None, vocab_size: int | None = None) -> Shape:
    return replace(
        shape,
        rows=shape.rows if rows is None else rows,
        vocab_size=shape.vocab_size if vocab_size is None else vocab_size,
    )


@dataclass
class Problem:
    hidden: Tensor  # (N, D) requires a gradient, as the weight does
    weight: Tensor  # (V, D)
    teacher_hidden: Tensor  # (N, E)
    teacher_weight: Tensor  # (V, E)
    targets: Tensor  # (N,)
    segments: Tensor  # (N,) pairs of y+ and y-

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def rows(self, count: int) -> Problem:
        """The first rows alone, as leaves of their own."""
        hidden, weight = self.hidden.detach()[:count].clone(), self.weight.detach().clone()
        return Problem(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            self.teacher_hidden[:count],
            self.teacher_weight,
            self.targets[:count],
            segments_of(count).to(self.segments.device),
        )


def likeliest(hidden: Tensor, weight: Tensor) -> Tensor:
    """The teacher's first choice for each row, as targets."""
    parts = [part @ weight.t() for part in hidden.split(64)]
    return torch.cat([part.argmax(1) for part in parts]) if parts else hidden.new_zeros(0).long()


def segments_of(rows: int) -> Tensor:
    """Pairs of sequences of about 32 rows."""
    sequences = 2 * max(1, rows // 64)
    return torch.arange(rows) * sequences // max(rows, 1)


def make(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    """A problem of this shape; the same numbers each time."""
    if shape.name == "smollm2":
        from bench.smollm2 import real_states

        tensors = real_states(shape.rows)
    else:
        tensors = _drawn(shape)
    hidden, weight, teacher_hidden, teacher_weight = (t.to(device, dtype) for t in tensors)
    return Problem(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        teacher_hidden,
        teacher_weight,
        likeliest(teacher_hidden, teacher_weight),
        segments_of(shape.rows).to(device),
    )


SPREAD, PEAK = 1.5, 13.5  # of a row's logits; how far its likeliest token stands out


def _drawn(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peaked rows: each has a likely token, the same for both sides; all else is noise."""
    generator = torch.Generator().manual_seed(0)
    likely = torch.randint(shape.vocab_size, (shape.rows,), generator=generator)

    def side(width: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(shape.vocab_size, width, generator=generator)
        noise = torch.randn(shape.rows, width, generator=generator) * SPREAD / width**0.5
        return noise + PEAK * weight[likely] / width, weight

    return *side(shape.width), *side(shape.teacher_width)
