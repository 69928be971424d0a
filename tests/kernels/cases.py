"""Random problems for the kernels, and relative errors."""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import torch
from torch import Tensor

from dudi_kernels import LMHead

BACKENDS = ["torch", "triton"]  # each runs the whole matrix; Triton interpreted
RTOL = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of rounded gradients
KINK_RTOL = 1e-4  # of total variation: where p is nearly q, a rounding error flips the sign
VALUE_RTOL = 1e-5  # values are fp32 whatever the inputs are
SMALL = 200_000  # bytes: several chunks and tiles at the shapes below


@dataclass
class Side:
    """Hidden states and a head, as parameters."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, self.softcap, self.scale)

    @property
    def inputs(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def double(self) -> Side:
        """The same numbers as float64 leaves."""
        copies = [
            None if t is None else t.detach().double().requires_grad_()
            for t in (self.hidden, self.weight, self.bias)
        ]
        assert copies[0] is not None and copies[1] is not None
        return Side(copies[0], copies[1], copies[2], self.softcap, self.scale)

    def logits(self) -> Tensor:
        return oracle.logits(self.hidden, self.weight, self.bias, self.softcap, self.scale)


def make_side(
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Side:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    hidden, weight = draw(rows, width), draw(vocab, width)
    with torch.no_grad():
        weight.mul_(2 / width**0.5)
    return Side(hidden, weight, draw(vocab) if bias else None, softcap, scale)


def make_targets(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor | None, want: Tensor | None) -> float:
    """Distance relative to the norm; a zero is compared absolutely."""
    assert got is not None and want is not None
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    norm = float(want.norm())
    return float((got - want).norm()) / (norm if norm > 0 else 1.0)


def gradient_errors(got: Side, want: Side) -> list[float]:
    return [error(a.grad, b.grad) for a, b in zip(got.inputs, want.inputs, strict=True)]
