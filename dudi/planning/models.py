"""The models of a recipe with shapes and no numbers: from their configurations, no weight is read.

A model is built on the meta device as transformers and peft build it, then given fake tensors,
which say that they are on a CPU: attention then takes the fused kernel that it takes there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from dudi.config import DuDiConfig, ScriptArguments, json_safe
from dudi.models import disable_dropout, load_model_config, refuse_adapter
from dudi.run import build_tokenizer, lora_settings, new_model_config
from dudi.signals import causal_lm

UNMASKED = "sdpa_unmasked"  # as fused attention without padding, or flash attention, saves tensors
UNPLANNED = ("quantization_config", "load_in_8bit", "load_in_4bit", "device_map")


class Spec(NamedTuple):
    """All that a model is built from; hashable, so that equal ones are built once."""

    argument: str  # what names it, for errors
    source: str | None  # name or path
    settings: str  # JSON: of a new model
    kwargs: str  # JSON: of from_pretrained
    default_dtype: str
    trained: bool = False
    adapter: str = ""  # JSON of LoraConfig's fields
    checkpointing: str = ""  # JSON of its keyword arguments
    keeps_dropout: bool = False


def student_spec(script: ScriptArguments, config: DuDiConfig) -> Spec:
    settings = ""
    if script.model_config is not None:
        sizes = {}
        if "vocab_size" not in script.model_config:
            sizes["vocab_size"] = len(build_tokenizer(script))
        settings = json.dumps(sizes | script.model_config, sort_keys=True)
    elif script.model_name_or_path is not None:
        refuse_adapter(script.model_name_or_path)
    adapter = ""
    if script.use_peft:
        adapter = json.dumps(lora_settings(script))
    checkpointing = ""
    if config.activation_checkpointing:
        checkpointing = json.dumps(config.activation_checkpointing_kwargs or {})
    return Spec(
        "model_name_or_path",
        script.model_name_or_path,
        settings,
        _kwargs(config.model_init_kwargs, "model_init_kwargs"),
        "float32",
        True,
        adapter,
        checkpointing,
        not config.disable_dropout,
    )


def teacher_spec(config: DuDiConfig) -> Spec | None:
    """None where no signal needs a teacher."""
    if not config.needs_teacher:
        return None
    for option in ("teacher_cache", "teacher_url"):
        if getattr(config, option) is not None:
            raise ValueError(f"{option} must be left out: what is planned is a live teacher")
    if config.teacher_model_name_or_path is None:
        raise ValueError("teacher_model_name_or_path must be given: a signal needs a teacher")
    kwargs = _kwargs(config.teacher_model_init_kwargs, "teacher_model_init_kwargs")
    name = "teacher_model_name_or_path"
    return Spec(name, config.teacher_model_name_or_path, "", kwargs, "auto")


def _kwargs(given: dict[str, Any] | None, argument: str) -> str:
    for name in UNPLANNED:
        if given and given.get(name) not in (None, False):
            raise ValueError(f"{argument} must not have {name}: what it does can't be planned")
    return json.dumps({name: json_safe(value) for name, value in (given or {}).items()})


@cache
def fakes() -> FakeTensorMode:
    """The one mode of all fake tensors here: those of two modes don't mix."""
    return FakeTensorMode()


@lru_cache(maxsize=8)
def build(spec: Spec) -> Any:
    """The model, all of its tensors fake."""
    model = _on_meta(spec)
    if spec.adapter:
        model = _adapted(model, json.loads(spec.adapter))
    if not spec.keeps_dropout:
        disable_dropout(model)
    if spec.checkpointing:
        options = json.loads(spec.checkpointing)
        offload = options.pop("offload", False)
        if offload:
            raise ValueError("activation_checkpointing_kwargs: offload can't be planned")
        every = options.pop("every_n_layers", 1)
        options = {"use_reentrant": False} | options | {"preserve_rng_state": False}
        causal_lm(model).activation_checkpointing_enable(options, every_n_layers=every)
    _make_fake(model)
    if not spec.trained:
        model.requires_grad_(False)
    return model.train(spec.trained)


def _on_meta(spec: Spec) -> Any:
    kwargs = json.loads(spec.kwargs)
    wanted = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or spec.default_dtype
    attention = kwargs.pop("attn_implementation", None)
    if spec.settings:
        config, wanted = new_model_config(json.loads(spec.settings)), "float32"
    else:
        config = load_model_config(str(spec.source), kwargs, spec.argument)
    dtype = _dtype(wanted, config, spec.argument)
    if attention and "flash" in attention:
        attention = UNMASKED
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{spec.argument} {spec.source!r} can't be planned: {error}") from error


def _dtype(wanted: Any, config: Any, argument: str) -> torch.dtype:
    if wanted == "auto":
        return config.get_text_config().dtype or config.dtype or torch.float32
    dtype = getattr(torch, str(wanted).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype of {argument} must be one of torch, or auto, got {wanted!r}")
    return dtype


def _adapted(model: Any, settings: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(**settings))


def _make_fake(model: nn.Module) -> None:
    """Fake tensors in place of parameters and buffers; what was tied stays tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too: its id must not come again
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    if id(old) not in made:
                        made[id(old)] = (_fake(old), old)
                    tensors[name] = made[id(old)][0]  # type: ignore[assignment]


def _fake(old: Tensor) -> Tensor:
    with fakes():
        new = torch.empty(old.shape, dtype=old.dtype)
        if not isinstance(old, nn.Parameter):
            return new
        return nn.Parameter(new, old.requires_grad)


@contextmanager
def padded(model: Any, is_padded: bool) -> Iterator[None]:
    """Inside, attention gets a mask as it does for a batch with padding; without, it gets none."""
    lm = causal_lm(model)
    own = lm.config._attn_implementation
    if own == "sdpa" and not is_padded:
        lm.set_attn_implementation(UNMASKED)
    try:
        yield
    finally:
        lm.set_attn_implementation(own)


AttentionInterface.register(UNMASKED, AttentionInterface()["sdpa"])
AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)
