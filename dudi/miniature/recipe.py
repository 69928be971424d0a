"""A recipe's options as those of its miniature: small models, few rows, two steps.

Only what has to change does: names and places, lengths, batches, how often things happen, and what
this machine can't do. All that says what is trained, and how, stays; every change is kept for the
user to read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import is_flash_attn_2_available

from dudi.config import DuDiConfig, ScriptArguments
from dudi.miniature.architectures import (
    MOST_PADDING,
    QWEN2_5,
    Family,
    Original,
    build,
    cut,
    family_of,
    is_chat,
    original,
)
from dudi.miniature.data import few_rows, first_row, like, write_lexicon, write_rows
from dudi.miniature.tokenizers import small_tokenizer
from dudi.run import new_model_config

STEPS = 2
STUDENT_WIDTH, TEACHER_WIDTH = 64, 96  # two widths, as D and E are
# At most; what a recipe leaves out has its default, which is cut down too.
SIZES = {
    "max_prompt_length": 192,
    "max_completion_length": 16,
    "max_teacher_prompt_length": 768,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "eval_generate_rows": 1,
}
# At most, where a recipe says something.
OFTEN = {
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "rollout_steps": STEPS,
    "rollout_batch_size": 4,
    "reference_sync_steps": 1,
    "teacher_skip_tokens": 2,
    "dataloader_num_workers": 0,
    "save_steps": 1,
    "eval_steps": 1,
    "warmup_steps": 1,
}
FIXED = {"max_steps": STEPS, "logging_steps": 1, "report_to": "none", "verbalizer_cache_dir": None}
# A teacher that answers from afar or from a cache says nothing about the miniature's tokens: a live
# one stands in. A single process has nobody to share with.
LEFT_OUT = (
    "dataset_config", "resume", "push_to_hub", "teacher_cache", "teacher_url", "fsdp_size",
)  # fmt: skip
# Of from_pretrained: where weights come from and where they go.
PLACES = (
    "revision", "subfolder", "variant", "token", "device_map", "max_memory", "offload_folder",
    "quantization_config", "load_in_8bit", "load_in_4bit",
)  # fmt: skip
# Only where there is a GPU.
OF_A_GPU = ("fp16", "tf32")


class Model(NamedTuple):
    """One of the two models, as it was and as it is."""

    name: str
    model_type: str
    tokenizer: str  # the family


class Miniature(NamedTuple):
    options: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]  # by option: what the recipe has, what the miniature has
    student: Model
    teacher: Model | None


def miniature(options: dict[str, Any], folder: Path) -> Miniature:
    """Make the models, tokenizers and data of a recipe's miniature in `folder`."""
    if (options.get("model_name_or_path") is None) == (options.get("model_config") is None):
        raise ValueError("give exactly one of model_name_or_path and model_config")
    if options.get("dataset_name") is None:
        raise ValueError("dataset_name must be given")
    small = options | _cut_down(options) | FIXED
    for name in LEFT_OUT:
        small.pop(name, None)
    if isinstance(small.get("vocabulary_verbalizer"), str):  # a map of the full vocabularies
        del small["vocabulary_verbalizer"]
    student, tokenizer = _student(options, small, folder)
    teacher = _teacher(options, small, folder)
    _data(options, small, folder, plain=tokenizer.chat_template is None)
    changes = {
        name: (options.get(name), small.get(name))
        for name in sorted(options.keys() | small.keys())
        if options.get(name) != small.get(name)
    }
    return Miniature(small, changes, student, teacher)


# ---- sizes and machine ---------------------------------------------------------------------------


def _cut_down(options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, most in SIZES.items():
        given = options.get(name, _default(name))
        found[name] = None if given is None else min(given, most)
    for name, most in OFTEN.items():
        if options.get(name) is not None:
            found[name] = min(options[name], most)
    schedules = options.get("weight_schedules")
    if schedules:
        found["weight_schedules"] = {
            name: {k: min(v, STEPS) if k == "steps" else v for k, v in schedule.items()}
            for name, schedule in schedules.items()
        }
    drawn = options.get("generation_kwargs") or {}
    if "min_new_tokens" in drawn:
        found["generation_kwargs"] = drawn | {"min_new_tokens": min(drawn["min_new_tokens"], 2)}
    return found | _for_this_machine(options)


def _default(name: str) -> Any:
    fields = {f.name: f for cls in (DuDiConfig, ScriptArguments) for f in dataclasses.fields(cls)}
    return fields[name].default


def _for_this_machine(options: dict[str, Any]) -> dict[str, Any]:
    """What only a GPU can do is left out where there is none; bf16 stays."""
    found: dict[str, Any] = {}
    gpu = torch.accelerator.is_available()
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        if options.get(name):
            found[name] = _init_kwargs(options[name], gpu)
    if gpu:
        return found
    found |= {name: False if name == "fp16" else None for name in OF_A_GPU if options.get(name)}
    if any(part in str(options.get("optim", "")) for part in ("bnb", "8bit", "paged")):
        found["optim"] = "adamw_torch"
    return found | {"use_cpu": True}


def _init_kwargs(given: dict[str, Any], gpu: bool) -> dict[str, Any]:
    kwargs = {name: value for name, value in given.items() if name not in PLACES}
    flash = "flash" in str(kwargs.get("attn_implementation"))
    if flash and not (gpu and is_flash_attn_2_available()):
        kwargs["attn_implementation"] = "sdpa"
    return kwargs


# ---- models --------------------------------------------------------------------------------------


def _student(options: dict[str, Any], small: dict[str, Any], folder: Path) -> tuple[Model, Any]:
    name = options.get("model_name_or_path")
    if name is None:
        return _new_student(options, small, folder)
    origin = original(name, "model_name_or_path")
    tokenizer = _tokenizer(origin, options.get("tokenizer_name_or_path"))
    small |= _save("", origin, tokenizer, STUDENT_WIDTH, folder / "student")
    return Model(name, origin.config.model_type, origin.family.name), tokenizer


def _new_student(options: dict[str, Any], small: dict[str, Any], folder: Path) -> tuple[Model, Any]:
    """A recipe that starts from nothing: its `model_config`, cut down."""
    name = options.get("tokenizer_name_or_path")
    if name is None:
        raise ValueError("tokenizer_name_or_path must be given with model_config")
    family = family_of(name) or QWEN2_5
    tokenizer = small_tokenizer(family, is_chat(name))
    tokenizer.save_pretrained(folder / "tokenizer")
    given = options["model_config"]
    config = new_model_config(given)
    cuts = cut(config, STUDENT_WIDTH, {})
    kept = {k: v for k, v in cuts.items() if k in given or v != config.to_dict().get(k)}
    if "vocab_size" in given:
        kept["vocab_size"] = _rows(len(tokenizer), given["vocab_size"] - family.tokens)
    else:
        kept.pop("vocab_size", None)  # the tokenizer's
    small["model_config"] = kept
    small["tokenizer_name_or_path"] = str(folder / "tokenizer")
    return Model("a new model", given["model_type"], family.name), tokenizer


def _teacher(options: dict[str, Any], small: dict[str, Any], folder: Path) -> Model | None:
    name = options.get("teacher_model_name_or_path")
    if name is None:
        for known in ("teacher_cache", "teacher_url"):
            if options.get(known) is not None:
                raise ValueError(
                    f"teacher_model_name_or_path must be given with {known} for a miniature: a "
                    "small live teacher of its architecture stands in"
                )
        return None
    origin = original(name, "teacher_model_name_or_path")
    tokenizer = _tokenizer(origin, options.get("teacher_tokenizer_name_or_path"))
    small |= _save("teacher_", origin, tokenizer, TEACHER_WIDTH, folder / "teacher")
    return Model(name, origin.config.model_type, origin.family.name)


def _tokenizer(origin: Original, other: str | None) -> Any:
    """Small, of the model's kind or of the one that the recipe names instead."""
    if other is None:
        return small_tokenizer(origin.family, origin.chats)
    family: Family = family_of(other) or origin.family
    return small_tokenizer(family, is_chat(other))


def _save(who: str, origin: Original, tokenizer: Any, width: int, folder: Path) -> dict[str, Any]:
    """The model and, apart from it, its tokenizer: beside a configuration of Qwen's, transformers
    would read it as one of Qwen's and add to it. Returns the options that name them."""
    own = small_tokenizer(origin.family, origin.chats)
    ids = {
        "vocab_size": _rows(len(own), origin.padding),
        **{f"{role}_token_id": getattr(own, f"{role}_token_id") for role in ("pad", "bos", "eos")},
    }
    build(origin, width, ids, seed=width).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        f"{who}model_name_or_path": str(folder / "model"),
        f"{who}tokenizer_name_or_path": str(folder / "tokenizer"),
    }


def _rows(tokens: int, padding: int) -> int:
    return tokens + (padding if padding < MOST_PADDING else 0)


# ---- data ----------------------------------------------------------------------------------------


def _data(options: dict[str, Any], small: dict[str, Any], folder: Path, plain: bool) -> None:
    own = first_row(str(options["dataset_name"]))
    plain = plain or (own is not None and isinstance(own.get("prompt"), str))
    languages = options.get("verbalizer_templates") or {}
    rows = like(few_rows("train", languages, plain), own)
    small["dataset_name"] = str(write_rows(folder / "train.jsonl", rows))
    small["dataset_train_split"] = "train"
    if options.get("dataset_test_name") or options.get("dataset_test_split"):
        held_out = like(few_rows("test", (), plain), own)
        small["dataset_test_name"] = str(write_rows(folder / "test.jsonl", held_out))
        small.pop("dataset_test_split", None)
    if options.get("lexicon"):
        small["lexicon"] = str(write_lexicon(folder / "lexicon.tsv"))
