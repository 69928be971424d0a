"""LMHead: what turns a hidden state into logits, softcap(h W^T + b) * scale.

Holds references to live parameters, never copies, so gradients reach them. `from_model` reads a
transformers model and refuses what the formula can't express; `check` compares with the model's own
logits, so that a multiplier nobody knew of can't slip through.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dudi_kernels.autograd import no_autocast
from dudi_kernels.scalars import SCALES, integer, number
from dudi_kernels.shard import VocabularyShard, group_of, is_distributed, local_rows, place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_ERROR = {torch.float32: 1e-3}  # of the norm, between check's logits and the model's
MAX_ERROR_HALF = 2e-2  # the model rounds its own logits
TENSORS = ("Tensor", "Parameter", "Buffer", "FakeTensor", "FunctionalTensor")

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
SCALING = "logits_scaling"  # a divisor, but for HyperCLOVA X
LOOKS_LIKE_SHAPE = re.compile(
    r"^(?!.*(attn|attention|router|init|mlp|expert)).*"
    r"((logit|lm_head|output|vocab).*(scal|multipl|cap|mup|divi)|unpadded_vocab|(scal|cap).*logit)"
)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A low-rank addition to a head, logits += scaling (h A^T) B^T; W + B A is never built."""

    a: Tensor  # (r, D)
    b: Tensor  # (V, r)
    scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            _check_tensor(f"lora.{name}", getattr(self, name))
        if self.a.ndim != 2 or self.b.ndim != 2 or len(self.a) != self.b.shape[1]:
            raise ValueError(
                "lora must have a of shape (r, D) and b of shape (V, r), "
                f"got {tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )
        number("lora.scaling", self.scaling, -math.inf, math.inf)

    def low(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., r)
        """fp32, also under autocast: rounded, it is what a close pair's gradient is made of."""
        with no_autocast(hidden.device):
            return nn.functional.linear(hidden.float(), self.a.float()) * self.scaling


@dataclass(frozen=True, eq=False, repr=False)
class LMHead:
    """A projection onto the vocabulary.

    Replaces::

        logits = hidden @ weight.T + bias + lora.scaling * (hidden @ lora.a.T) @ lora.b.T
        logits = softcap * tanh(logits / softcap)
        logits = logits.masked_fill(bias == -inf, -inf) * scale

    Args:
        weight: (V, D), float32, bfloat16 or float16.
        bias: (V,) or None; `-inf` entries mask tokens, also under a softcap.
        softcap: the bound of a tanh on the logits (Gemma), or None.
        scale: a positive factor on the logits (Cohere; Granite divides, so 1 / logits_scaling).
        lora: a low-rank adapter of the head (peft), or None; trained without building W + B A.
        shard: where these rows are in a vocabulary that the ranks of a process group share, or
            None: `LMHead.sharded` finds that out.

    Raises:
        TypeError: weight or bias is not a plain floating-point tensor (quantised heads are not
            supported, a DTensor goes to `LMHead.sharded`).
        ValueError: shapes or devices that don't fit, a softcap or a scale that is not positive, or
            so small or large that fp32 does not hold its products. A bias that is NaN, +inf or
            -inf throughout is refused by the losses, on a CPU.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    scale: float = 1.0
    lora: LoRA | None = None
    shard: VocabularyShard | None = None

    def __post_init__(self) -> None:
        _check_tensor("weight", self.weight)
        if self.weight.ndim != 2 or not len(self.weight):
            got = tuple(self.weight.shape)
            raise ValueError(f"weight must have shape (V, D) with V > 0, got {got}")
        if self.bias is not None:
            _check_tensor("bias", self.bias)
            if tuple(self.bias.shape) != (self.vocab_size,):
                got = tuple(self.bias.shape)
                raise ValueError(f"bias must have shape ({self.vocab_size},), got {got}")
            if self.bias.device != self.weight.device:
                raise ValueError(
                    f"bias must be on {self.weight.device} as weight is, got {self.bias.device}"
                )
        self._check_lora()
        if self.shard is not None and self.shard.rows != self.vocab_size:
            raise ValueError(
                f"weight must have {self.shard.rows} rows as shard has, got {self.vocab_size}"
            )
        if self.softcap is not None:
            number("softcap", self.softcap, *SCALES)
        number("scale", self.scale, *SCALES)

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        if not isinstance(self.lora, LoRA):
            raise TypeError(f"lora must be a LoRA or None, got {type(self.lora).__name__}")
        got = (len(self.lora.b), self.lora.a.shape[1])
        if got != (self.vocab_size, self.width):
            raise ValueError(
                f"lora must fit a head of shape ({self.vocab_size}, {self.width}), got {got}"
            )
        if not self.lora.a.device == self.lora.b.device == self.weight.device:
            raise ValueError(
                f"lora must be on {self.weight.device} as weight is, got {self.lora.a.device} and "
                f"{self.lora.b.device}"
            )

    def __repr__(self) -> str:
        bias = "no bias" if self.bias is None else "bias"
        return (
            f"LMHead({self.vocab_size} x {self.width}, {bias}, softcap={self.softcap}, "
            f"scale={self.scale})"
        )

    @property
    def vocab_size(self) -> int:
        """Rows that are here: all, or this rank's."""
        return self.weight.shape[0]

    @property
    def whole_size(self) -> int:
        """Rows of the whole vocabulary, wherever they are."""
        return self.vocab_size if self.shard is None else self.shard.vocab_size

    @property
    def planned_size(self) -> int:
        """Rows that plans are made for, so that ranks with fewer make the same."""
        return self.vocab_size if self.shard is None else self.shard.largest

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def map(self, change: Callable[[Tensor], Tensor]) -> LMHead:
        """The same head with other tensors of the same shapes."""
        bias = change(self.bias) if self.bias is not None else None
        lora = self.lora
        if lora is not None:
            lora = LoRA(change(lora.a), change(lora.b), lora.scaling)
        return LMHead(change(self.weight), bias, self.softcap, self.scale, lora, self.shard)

    def detach(self) -> LMHead:
        """The same head without gradients."""
        return self.map(Tensor.detach)

    def part(self, start: int, stop: int) -> LMHead:
        """Rows [start, stop) of those that are here, by themselves."""
        bias, lora = self.bias, self.lora
        if bias is not None:
            bias = bias[start:stop]
        if lora is not None:
            lora = LoRA(lora.a, lora.b[start:stop], lora.scaling)
        return LMHead(self.weight[start:stop], bias, self.softcap, self.scale, lora)

    def scaled(self, factor: float) -> LMHead:
        """The same head with logits times `factor`."""
        return replace(self, scale=self.scale * factor)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V)
        """Dense logits of the rows here, in the inputs' dtype: for checks and tiny uses."""
        out = nn.functional.linear(hidden, self.weight, self.bias)
        if self.lora is not None:
            low = self.lora.low(hidden)
            out = out + nn.functional.linear(low, self.lora.b.to(low.dtype)).to(out.dtype)
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
            if self.bias is not None:
                out = out.masked_fill(self.bias == -torch.inf, -torch.inf)
        return out * self.scale

    @classmethod
    def sharded(
        cls,
        weight: Tensor,  # (V of this rank, D), or a DTensor (V, D)
        bias: Tensor | None = None,  # (V of this rank,), or a DTensor (V,)
        softcap: float | None = None,
        scale: float = 1.0,
        lora: LoRA | None = None,
        *,
        group: ProcessGroup | DeviceMesh | None = None,
        start: int | None = None,
        vocab_size: int | None = None,
    ) -> LMHead:
        """A head whose rows the ranks of a group share: each holds those after the rank before it.

        Replaces, in every loss::

            weight = torch.cat(all_gather(weight))  # and bias, and lora.b
            loss = fused_loss(hidden, LMHead(weight, bias, softcap, scale, lora), ...)

        All ranks call the losses alike, with all rows: hidden states, targets, weights of the rows
        and `lora.a` are the same everywhere, `lora.b` is that of this rank's rows. All get the same
        values, the whole gradient of the hidden states (and of `lora.a`), and the gradient of their
        own rows of the head. A teacher's head is sharded in the same way. Heads are made on all
        ranks together, as are the losses and their backward passes.

        Args:
            weight, bias: this rank's rows, any number of them; or DTensors, Shard(0) over a mesh of
                one dimension, whose gradients are sharded as they are.
            group: the process group (or mesh of one dimension); a DTensor has one.
            start, vocab_size: where this rank's rows start and how many there are in all; checked
                against what the ranks hold, if given.

        Raises:
            ValueError: on all ranks, where they don't fit together: a gap, an overlap, an empty
                slice, other dtypes, widths, softcaps or scales, a bias or LoRA on some only.
            TypeError, ValueError: as `LMHead`; a DTensor that is sharded in another way.
        """
        own, mesh = group_of(weight, group)
        weight, bias = local_rows("weight", weight, mesh), local_rows("bias", bias, mesh)
        for name, value in (("start", start), ("vocab_size", vocab_size)):
            if value is not None:
                integer(name, value, 0)
        facts = _facts(weight, bias, softcap, scale, lora)
        rows = len(weight) if isinstance(weight, Tensor) and weight.ndim else 0
        shard = place(own, rows, weight.device, start, vocab_size, facts)
        return cls(weight, bias, softcap, scale, lora, shard)

    @classmethod
    def from_model(cls, model: Any, *, group: ProcessGroup | DeviceMesh | None = None) -> LMHead:
        """Read the head of a transformers causal LM (or of a PEFT model around one).

        Honours bias, softcap (`final_logit_softcapping` and its like), scale (`logit_scale`,
        `logits_scaling`, `lm_head_multiplier`, `output_multiplier`), peft's `modules_to_save` and
        its LoRA on the head.

        Args:
            group: the ranks that share the vocabulary, where the model holds some rows of its head
                on each of them (plain, or a DTensor): then all of them call, see `LMHead.sharded`.

        Raises:
            TypeError: not such a model; a quantised head; a DTensor without `group`.
            ValueError: the model has no head of this form: an encoder-decoder, no output
                embeddings, a head adapted otherwise than by plain LoRA, a setting that shapes
                logits in an unknown way.
        """
        lm = _causal_lm(model)
        name = type(lm).__name__
        if getattr(lm.config, "is_encoder_decoder", False):
            raise ValueError(f"model must be a decoder-only causal LM, got {name}")
        module = lm.get_output_embeddings()
        if module is None:
            raise ValueError(f"model must have output embeddings, got {name} without any")
        module, lora = _adapted(module, name)
        weight = getattr(module, "weight", None)
        _refuse_quantized(weight, name)
        if not isinstance(weight, Tensor):
            kind = type(module).__name__
            raise ValueError(f"the head of {name} must be a linear layer, got {kind}")
        softcap, scale = _shape_of_logits(lm.config.get_text_config(), name)
        bias = getattr(module, "bias", None)
        if group is not None:
            return cls.sharded(weight, bias, softcap, scale, lora, group=group)
        return cls(weight, bias, softcap, scale, lora)

    @staticmethod
    def check(model: Any) -> None:
        """Compare with the model's own logits on four tokens, on the model's device.

        Raises:
            ValueError: they differ; the model does something to its logits that LMHead can't.
        """
        lm, head = _causal_lm(model), LMHead.from_model(model)
        name = type(lm).__name__
        if lm.base_model is lm:
            raise ValueError(f"model must have a body apart from its head, got {name}")
        ids = torch.arange(1, 5, device=head.weight.device)[None] % head.vocab_size
        with _evaluating(lm), torch.no_grad():
            want = lm(input_ids=ids, use_cache=False).logits.float()
            hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
            got = head.logits(hidden.to(head.weight.dtype)).float()
        bound = MAX_ERROR.get(head.weight.dtype, MAX_ERROR_HALF)
        if got.shape != want.shape or not (got - want).norm() <= bound * want.norm():
            raise ValueError(
                f"{name} makes its logits otherwise than softcap(h W^T + bias) * scale "
                f"with softcap={head.softcap}, scale={head.scale}; it is not supported"
            )


def _facts(
    weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, lora: LoRA | None
) -> dict[str, Any]:
    """What ranks must have in common to share a head."""
    return {
        "width": weight.shape[-1],
        "dtype": weight.dtype,
        "whether there is a bias": bias is not None,
        "softcap (0: none)": float(softcap or 0.0),
        "scale": float(scale),
        "the rank of lora (0: none)": 0 if lora is None else len(lora.a),
    }


def as_head(head: LMHead | Tensor | None, name: str) -> LMHead:
    """A bare weight stands for a head without bias, softcap and scale."""
    if isinstance(head, LMHead):
        return head
    if isinstance(head, Tensor):
        return LMHead(head)
    raise TypeError(f"{name} must be an LMHead or a weight tensor, got {type(head).__name__}")


def _check_tensor(name: str, value: Any) -> None:
    kind = type(value).__name__
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    if is_distributed(value):
        raise TypeError(
            f"{name} must be a plain tensor, got {kind}: under FSDP, make the head in the model's "
            "forward, where it is whole; a vocabulary that ranks share goes to LMHead.sharded (or "
            "from_model with its group)"
        )
    if kind not in TENSORS:  # DTensor, Params4bit, torchao's: their dtype may look like a float's
        raise TypeError(f"{name} must be a plain tensor, got {kind}: such heads are not supported")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {value.dtype}")


def _refuse_quantized(weight: Any, name: str) -> None:
    kind = type(weight).__name__
    if isinstance(weight, Tensor) and kind not in TENSORS and not is_distributed(weight):
        raise TypeError(
            f"the head of {name} must not be quantized, got a weight of {kind}: leave it out "
            "(bitsandbytes: llm_int8_skip_modules: [lm_head])"
        )


def _causal_lm(model: Any) -> Any:
    """The transformers model, out of its PEFT wrapper."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(lm, "get_output_embeddings") or not hasattr(lm, "config"):
        raise TypeError(f"model must be a transformers causal LM, got {type(lm).__name__}")
    return lm


def _adapted(module: Any, name: str) -> tuple[Any, LoRA | None]:
    """A head without its peft wrapper, and its LoRA; peft's whole trained copy where it has one."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = list(module.active_adapters)
        if module.disable_adapters or not active:
            return module.original_module, None
        return module.modules_to_save[active[0]], None
    if type(module).__module__.partition(".")[0] != "peft":
        return module, None
    if not hasattr(module, "lora_A") or not hasattr(module, "base_layer"):
        raise ValueError(
            f"the head of {name} is adapted by {type(module).__module__} ({type(module).__name__}),"
            " which is not supported: leave lm_head out of target_modules, adapt it by LoRA, or "
            "train it whole with modules_to_save=['lm_head']"
        )
    active = [key for key in module.active_adapters if key in module.lora_A]
    if module.merged or module.disable_adapters or not active:
        return module.base_layer, None
    return module.base_layer, _lora(module, active, name)


def _lora(module: Any, active: list[str], name: str) -> LoRA:
    """The active adapters of peft's LoRA layer as one."""
    for key in active:
        if module.use_dora[key] or module.lora_bias[key] or key in module.lora_variant:
            raise ValueError(f"the head of {name} is adapted by a variant of LoRA (DoRA, a bias)")
        dropout = module.lora_dropout[key]
        if getattr(dropout, "p", 0.0) > 0 and module.training:
            raise ValueError(f"the LoRA of the head of {name} must have lora_dropout=0 in training")
    if len(active) == 1:
        (key,) = active
        return LoRA(module.lora_A[key].weight, module.lora_B[key].weight, module.scaling[key])
    scaled = [module.lora_A[key].weight * module.scaling[key] for key in active]
    return LoRA(torch.cat(scaled), torch.cat([module.lora_B[key].weight for key in active], 1))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _shape_of_logits(config: Any, name: str) -> tuple[float | None, float]:
    """(softcap, scale) from a model's configuration."""
    known = (*SOFTCAPS, *MULTIPLIERS, SCALING)
    for key, value in config.to_dict().items():
        neutral = value is None or isinstance(value, bool | str | dict | list) or value == 1
        if key not in known and not neutral and LOOKS_LIKE_SHAPE.match(key):
            raise ValueError(f"{name} has {key}={value}, which LMHead does not know how to honour")

    def read(key: str) -> float | None:
        value = getattr(config, key, None)
        return float(value) if isinstance(value, int | float) else None

    softcap = next((value for key in SOFTCAPS if (value := read(key))), None)
    scale = 1.0
    if divisor := read(SCALING):
        scale = divisor if name.startswith("HyperCLOVAX") else 1 / divisor
    for key in MULTIPLIERS:
        scale *= read(key) or 1.0
    if softcap and read("output_multiplier"):  # c tanh(x m / c) = softcap_{c / m}(x) m
        softcap /= scale
    return softcap, scale
