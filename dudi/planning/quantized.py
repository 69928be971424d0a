"""Linear layers of 8 or 4 bits a weight on fake tensors: what they hold, and what a product needs.

bitsandbytes keeps the packed weights alone. In 4 bits each product, forward and backward, unpacks
its weight for as long as it takes; in 8 bits the forward multiplies as it is, the backward unpacks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dudi.quantization import BITS_AND_BYTES, read_quantization
from dudi.signals import causal_lm

SCALE = 4.0  # bytes of a block of weights in 4 bits; with its scales quantized in turn:
NESTED_SCALE = 1 + 4 / 256
BLOCK = 64  # weights


class Unpacked(torch.autograd.Function):
    """x W^T, of a W that is there only meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.unpacked(x).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.layer.unpacked(grads[0]), None


class QuantizedLinear(nn.Linear):
    """As bitsandbytes' Linear4bit and Linear8bitLt, with shapes and no numbers."""

    def __init__(self, own: nn.Linear, settings: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = own.in_features, own.out_features
        count = own.in_features * own.out_features
        if settings.get("load_in_4bit"):
            nested = settings.get("bnb_4bit_use_double_quant")
            size = count / 2 + count / BLOCK * (NESTED_SCALE if nested else SCALE)
        else:
            size = count + SCALE * own.out_features
        packed = torch.empty(math.ceil(size), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = own.bias

    @property
    def packed_away(self) -> int:
        """How many weights there are more than packed elements."""
        return self.in_features * self.out_features - self.weight.numel()

    def unpacked(self, like: Tensor) -> Tensor:
        return like.new_empty(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y = Unpacked.apply(x, self)
        return y if self.bias is None else y + self.bias


def planned_settings(given: dict[str, Any], argument: str) -> dict[str, Any]:
    """Those that can be planned, checked as they are when a model is loaded."""
    read_quantization(given, argument)
    if not any(given.get(key) for key in BITS_AND_BYTES):
        method = given.get("quant_method")
        raise ValueError(
            f"quantization_config of {argument} can be planned for load_in_8bit and load_in_4bit "
            f"alone, got quant_method {method!r}"
        )
    return given


def quantize(model: Any, settings: dict[str, Any], upcast: bool) -> None:
    """Put `QuantizedLinear` where bitsandbytes quantizes; `upcast`: the rest goes to float32, as
    peft prepares a student."""
    lm = causal_lm(model)
    skipped = settings.get("llm_int8_skip_modules")
    head = lm.get_output_embeddings()
    for name, module in list(lm.named_modules()):
        inside = any(part in name.split(".") for part in skipped or ())
        if type(module) is nn.Linear and not inside and not (skipped is None and module is head):
            lm.set_submodule(name, QuantizedLinear(module, settings))
    for p in lm.parameters() if upcast else ():
        if p.is_floating_point():
            p.data = p.data.float()
        p.requires_grad_(False)
