"""Models and tokenizers by name or path, and what is asked of them before anything is trained."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dudi.config import json_safe
from dudi.known import KnownTeacher
from dudi.quantization import never_repacked, with_quantization
from dudi_kernels import LMHead


def looks_like_a_path(text: str) -> bool:
    """Whether a name can only be meant as a path: a Hub id has one slash at most."""
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def load_model(
    model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None, argument: str
) -> Any:
    """A causal LM from a name or path; a loaded model is returned as it is.

    Raises ValueError, naming `argument`, for what is not there or can't be loaded.
    """
    if not isinstance(model, str):
        return never_repacked(model)
    kwargs = {"trust_remote_code": False, **(init_kwargs or {})}
    kwargs = with_quantization(kwargs, argument)
    return never_repacked(_load(AutoModelForCausalLM.from_pretrained, model, argument, kwargs))


def load_model_config(name: str, init_kwargs: dict[str, Any], argument: str) -> Any:
    """The configuration of a name or path; no weight is read. ValueError names `argument`."""
    return _load(
        AutoConfig.from_pretrained, name, argument, {"trust_remote_code": False} | init_kwargs
    )


def load_tokenizer(name: str, argument: str) -> Any:
    """The tokenizer of a name or path; ValueError names `argument`."""
    return _load(AutoTokenizer.from_pretrained, name, argument, {"trust_remote_code": False})


def _load(loader: Any, name: str, argument: str, kwargs: dict[str, Any]) -> Any:
    path = Path(name).expanduser()
    if looks_like_a_path(name) and not path.exists():
        raise ValueError(f"{argument} {name!r} does not exist")
    try:
        return loader(str(path) if path.is_dir() else name, **kwargs)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        told = "can't be loaded"
        if not path.exists():
            told = "is neither a folder here nor a Hub id that can be loaded"
        raise ValueError(f"{argument} {name!r} {told}: {error}") from error


def refuse_adapter(student: Any) -> None:
    """A student's path must hold a whole model."""
    if isinstance(student, str) and (Path(student).expanduser() / "adapter_config.json").exists():
        raise ValueError(
            f"the student {student!r} is an adapter, not a model: train the merged model "
            "(`merge_and_unload` of peft, then `save_pretrained`), with or without a new adapter"
        )


def adapter_settings(base: Any, model: Any) -> dict[str, Any] | None:
    """The settings of a PEFT model's active adapter and a hash of what it adapts, JSON-safe; None
    where there is no adapter."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    settings = configs[model.active_adapter].to_dict()
    passing = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
    kept = {name: json_safe(v) for name, v in sorted(settings.items()) if name not in passing}
    return kept | {"base model": _frozen_hash(base)}


def _frozen_hash(model: nn.Module) -> str:
    """Of names, shapes and some values of the weights that are not trained."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            some = weight.detach().flatten()[:256].float().cpu().numpy()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def check_positions(student: Any, teacher: Any, dataset: Any, args: Any) -> None:
    """Raise for sequences longer than a table of learned positions: looking one up would fail."""
    most = args.max_completion_length if args.needs_samples else 0
    for who, model, column in (
        ("student", student, "prompt_ids"),
        ("teacher", teacher, "teacher_prompt_ids"),
    ):
        limit = None if model is None else learned_positions(model)
        if limit is None:
            continue
        for row in dataset.select_columns(["row", column, "completion_ids"]):
            length = len(row[column]) + max(len(row["completion_ids"]), most)
            if length > limit:
                raise ValueError(
                    f"row {row['row']} of the train dataset takes up to {length} tokens, the "
                    f"{who} has {limit} positions: lower max_prompt_length or max_completion_length"
                )


def learned_positions(model: Any) -> int | None:
    """Rows of a position embedding; None where positions are computed."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in ("wpe", "embed_positions"):
            return module.num_embeddings
    return None


def disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def check_models(student: Any, teacher: Any) -> None:
    """Raise ValueError unless the student can be trained, from this teacher (or None)."""
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("the student must have parameters that require a gradient, it has none")
    LMHead.check(student)
    if teacher is not None and not isinstance(teacher, KnownTeacher):
        LMHead.check(teacher)
