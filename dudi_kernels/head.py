"""LMHead: what turns a hidden state into logits, softcap(h W^T + b) * scale.

Holds references to live parameters, never copies, so gradients reach them. `from_model` reads a
transformers model and refuses what the formula can't express; `check` compares with the model's own
logits, so that a multiplier nobody knew of can't slip through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MAX_ERROR = 2e-2  # of the norm; bf16 logits of the model itself are off by less


class LMHead:
    """A projection onto the vocabulary.

    Replaces::

        logits = hidden @ weight.T + bias
        logits = softcap * tanh(logits / softcap)
        logits = logits * scale

    Args:
        weight: (V, D), floating point.
        bias: (V,) or None; `-inf` entries mask tokens.
        softcap: the bound of a tanh on the logits (Gemma), or None.
        scale: a factor on the logits (Cohere; Granite divides, so 1 / logits_scaling).

    Raises:
        TypeError: weight or bias is not a floating-point tensor (quantised heads are not supported).
        ValueError: shapes that don't fit, a softcap that is not positive, a scale that is not finite
            or is 0.
    """

    __slots__ = ("bias", "scale", "softcap", "weight")

    def __init__(
        self,
        weight: Tensor,  # (V, D)
        bias: Tensor | None = None,  # (V,)
        softcap: float | None = None,
        scale: float = 1.0,
    ):
        _check_weight(weight)
        if bias is not None and tuple(bias.shape) != (len(weight),):
            raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
        if scale == 0 or not abs(scale) < float("inf"):
            raise ValueError(f"scale must be finite and not 0, got {scale}")
        self.weight = weight
        self.bias = bias
        self.softcap = float(softcap) if softcap is not None else None
        self.scale = float(scale)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def detach(self) -> LMHead:
        """The same head without gradients."""
        bias = self.bias.detach() if self.bias is not None else None
        return LMHead(self.weight.detach(), bias, self.softcap, self.scale)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V)
        """Dense logits, in the inputs' dtype: for checks and tiny uses."""
        out = nn.functional.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
        return out * self.scale

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """Read the head of a transformers causal LM (or of a PEFT model around one).

        Honours softcap (`final_logit_softcapping`), scale (`logit_scale`, `logits_scaling`,
        `lm_head_multiplier`, `output_multiplier`) and bias.

        Raises:
            ValueError: the model has no head of this form: an encoder-decoder, no output embeddings,
                an adapted (LoRA), quantised or sharded (DTensor) head.
        """
        lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = type(lm).__name__
        if getattr(lm.config, "is_encoder_decoder", False):
            raise ValueError(f"model must be a decoder-only causal LM, got {name}")
        module = lm.get_output_embeddings()
        module = getattr(module, "modules_to_save", {}).get("default", module)  # peft's saved copy
        if module is None:
            raise ValueError(f"model must have output embeddings, got {name} without any")
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"the head of {name} is adapted by LoRA, which is not supported yet: leave lm_head "
                "out of target_modules, or train it whole with modules_to_save=['lm_head']"
            )
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"the head of {name} must be a linear layer, got {type(module).__name__}")
        softcap, scale = _shape_of_logits(lm)
        return cls(weight, getattr(module, "bias", None), softcap, scale)

    @staticmethod
    def check(model: Any) -> None:
        """Compare with the model's own logits on a few tokens.

        Raises:
            ValueError: they differ; the model does something to its logits that LMHead can't.
        """
        lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = LMHead.from_model(model)
        ids = torch.arange(1, 5, device=head.weight.device)[None] % head.vocab_size
        training = lm.training
        lm.eval()
        try:
            with torch.no_grad():
                want = lm(input_ids=ids, use_cache=False).logits.float()
                hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
                got = head.logits(hidden.to(head.weight.dtype)).float()
        finally:
            lm.train(training)
        if got.shape != want.shape or not (got - want).norm() <= MAX_ERROR * want.norm():
            raise ValueError(
                f"{type(lm).__name__} makes its logits otherwise than softcap(h W^T + bias) * scale "
                f"with softcap={head.softcap}, scale={head.scale}; it is not supported"
            )


def as_head(head: LMHead | Tensor, name: str) -> LMHead:
    """A bare weight stands for a head without bias, softcap and scale."""
    if isinstance(head, LMHead):
        return head
    if isinstance(head, Tensor):
        return LMHead(head)
    raise TypeError(f"{name} must be an LMHead or a weight tensor, got {type(head).__name__}")


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    kind = type(weight).__name__
    if kind == "DTensor" or kind == "Params4bit" or kind == "Int8Params":
        raise TypeError(f"weight must be a plain tensor; {kind} heads are not supported yet")
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise TypeError(f"weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (V, D) with V > 0, got {tuple(weight.shape)}")


def _shape_of_logits(lm: Any) -> tuple[float | None, float]:
    """(softcap, scale) from a model's configuration."""
    config = lm.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if isinstance(value := getattr(config, "logit_scale", None), float | int):
        scale = float(value)
    if (value := getattr(config, "logits_scaling", None)) is not None:
        scale = float(value) if "HyperCLOVAX" in type(lm).__name__ else 1 / float(value)
    if (value := getattr(config, "lm_head_multiplier", None)) is not None:
        scale = float(value)
    if (value := getattr(config, "output_multiplier", None)) is not None:
        scale = float(value)  # T tanh(x mult / T) = softcap_{T / mult}(x) mult
        softcap = softcap / scale if softcap else softcap
    return softcap or None, scale
