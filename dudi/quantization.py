"""Models with quantized weights: a recipe's mapping becomes transformers' configuration, and what
can be trained of such a model is an adapter (QLoRA).

    teacher_model_init_kwargs: {quantization_config: {load_in_4bit: true}}

Linear layers of the body are quantized as they are loaded; the head stays as it was, which the
losses read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from dudi.config import nearest

BITS_AND_BYTES = ("load_in_8bit", "load_in_4bit")


def with_quantization(kwargs: dict[str, Any], argument: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`, a mapping `quantization_config` read."""
    given = kwargs.get("quantization_config")
    if not isinstance(given, Mapping):
        return kwargs
    return kwargs | {"quantization_config": read_quantization(dict(given), argument)}


def read_quantization(given: dict[str, Any], argument: str) -> Any:
    """transformers' configuration of this mapping; ValueError names `argument` and the key."""
    name = f"quantization_config of {argument}"
    bits = any(given.get(key) for key in BITS_AND_BYTES)
    method = "bitsandbytes" if bits else given.get("quant_method")
    kinds = AUTO_QUANTIZATION_CONFIG_MAPPING
    if not bits and method not in kinds:
        raise ValueError(
            f"{name} must have {' or '.join(BITS_AND_BYTES)}, or a quant_method of "
            f"{', '.join(kinds)}, got {given}"
        )
    kind: Any = kinds["bitsandbytes_4bit" if bits else str(method)]
    known = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    for key in given:
        if key not in known and key != "quant_method":
            raise ValueError(f"{name} has no {key!r}{nearest(str(key), known)}")
    try:
        return AutoQuantizationConfig.from_dict(given)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} can't be used: {error}") from error


def is_quantized(model: Any) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def never_repacked(model: Any) -> Any:
    """The model, which bitsandbytes will not repack when it is first read without gradients: on a
    CPU no gradient passes from then on, and rows must be a multiple of 64 wide."""
    for module in model.modules() if is_quantized(model) else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def prepared_student(model: Any, adapter: Any) -> Any:
    """The student as its adapter finds it: quantized, it is frozen and all else of it in float32
    (peft's `prepare_model_for_kbit_training`; checkpointing is the Trainer's affair)."""
    if not is_quantized(model):
        return model
    if adapter is None:
        raise ValueError(
            "the student is quantized, and can't be trained but through an adapter: set use_peft "
            "(or give peft_config), or leave quantization_config out"
        )
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
