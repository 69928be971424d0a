"""What a recipe's models are, and the same architectures a thousand times smaller.

A folder's or the Hub's configuration says it; of the names below it is known without the Hub. A
miniature has the same model_type, attention pattern, ratio of heads, ties and softcaps; its head is
as many rows longer than its tokenizer as the original's is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from dudi.models import load_model_config

LAYERS, HEADS, EXPERTS = 2, 4, 4
WINDOW = 16  # shorter than the prompts, so that a sliding window slides
# Rows beyond the tokens are kept up to here: a head may be padded, but not be another's.
MOST_PADDING = 1024


class Family(NamedTuple):
    """A tokenizer that several models share."""

    name: str
    tokens: int  # len(tokenizer), which a head may exceed or, with Gemma-3's text models, lack


QWEN2_5 = Family("qwen2.5", 151_665)
QWEN3 = Family("qwen3", 151_669)
LLAMA3 = Family("llama3", 128_256)
GEMMA2 = Family("gemma2", 256_000)
GEMMA3 = Family("gemma3", 262_145)  # the last is <image_soft_token>, in the text models' too
FAMILIES = (QWEN2_5, QWEN3, LLAMA3, GEMMA2, GEMMA3)


class Known(NamedTuple):
    """What `config.json` of a name says that a miniature keeps."""

    model_type: str
    head_rows: int
    tied: bool
    family: Family
    softcap: float | None = None


# By the start of the name; a variant (-Instruct, -it, -Base) may follow it.
KNOWN = {
    "Qwen/Qwen2.5-(0.5B|1.5B|3B)": Known("qwen2", 151_936, True, QWEN2_5),
    "Qwen/Qwen2.5-(7B|14B|32B|72B)": Known("qwen2", 152_064, False, QWEN2_5),
    "Qwen/Qwen3-(0.6B|1.7B|4B)": Known("qwen3", 151_936, True, QWEN3),
    "Qwen/Qwen3-(8B|14B|32B)": Known("qwen3", 151_936, False, QWEN3),
    "meta-llama/Llama-3.2-(1B|3B)": Known("llama", 128_256, True, LLAMA3),
    "meta-llama/Llama-3.1-(8B|70B)": Known("llama", 128_256, False, LLAMA3),
    "aisingapore/Llama-SEA-LION-v3-(8B|70B)": Known("llama", 128_256, False, LLAMA3),
    "aisingapore/Gemma-SEA-LION-v3-9B": Known("gemma2", 256_000, True, GEMMA2, 30.0),
    "google/gemma-2-(2b|9b|27b)": Known("gemma2", 256_000, True, GEMMA2, 30.0),
    "google/gemma-3-(270m|1b)": Known("gemma3_text", 262_144, True, GEMMA3),
    "google/gemma-3-(4b|12b|27b)": Known("gemma3", 262_208, True, GEMMA3),
}
# Names of models that were taught to chat; of Qwen3 those without a suffix.
CHAT = re.compile(r"instruct|chat|-it\b|^Qwen/Qwen3-[\d.]+B$", re.IGNORECASE)


class Original(NamedTuple):
    """What a miniature is made of."""

    name: str
    config: Any
    family: Family
    chats: bool  # whether its tokenizer ends turns with a token of their own

    @property
    def padding(self) -> int:
        """Rows of the head beyond the tokens; negative where tokens have no row."""
        return self.config.get_text_config().vocab_size - self.family.tokens


def known(name: str) -> Known | None:
    return next((k for start, k in KNOWN.items() if re.match(start + r"\b", name)), None)


def family_of(name: str) -> Family | None:
    """Of a tokenizer's name: None where it is not known."""
    found = known(name)
    return None if found is None else found.family


def is_chat(name: str) -> bool:
    """Whether that model, or a tokenizer of that name, was made to chat: folders are the user's."""
    return bool(CHAT.search(name)) or Path(name).expanduser().is_dir()


def original(name: str, argument: str) -> Original:
    """What a name or path is; ValueError names `argument` where that can't be told."""
    found = None if Path(name).expanduser().is_dir() else known(name)
    if found is not None:
        return Original(name, _config_of(found), found.family, is_chat(name))
    config = load_model_config(name, {}, argument)
    return Original(name, config, _nearest(config), is_chat(name))


def _nearest(config: Any) -> Family:
    """The tokenizer that a head of that size belongs to, or one of its own."""
    rows, kind = config.get_text_config().vocab_size, config.model_type
    near = [f for f in FAMILIES if -2 < rows - f.tokens < MOST_PADDING]
    alike = [f for f in near if f.name[:5] == kind[:5]]  # qwen2 and qwen3 differ by four tokens
    return next(iter(alike or near), Family(f"of {rows}", rows))


def _config_of(found: Known) -> Any:
    settings: dict[str, Any] = {"vocab_size": found.head_rows, "tie_word_embeddings": found.tied}
    if found.softcap is not None:
        settings["final_logit_softcapping"] = found.softcap
    if found.model_type == "gemma3":  # reads images too: its text model is a part of it
        settings = {"text_config": settings, "tie_word_embeddings": found.tied}
    return AutoConfig.for_model(found.model_type, **settings)


# ---- cutting down --------------------------------------------------------------------------------


def cut(config: Any, width: int, ids: dict[str, Any]) -> dict[str, Any]:
    """The settings of a small model of that architecture; `ids`: vocab_size and special tokens."""
    settings = config.to_dict()
    for name in ("architectures", "dtype", "_name_or_path", "quantization_config"):
        settings.pop(name, None)
    parts = [name for name, value in settings.items() if _is_model(name, value)]
    if not parts:
        return settings | _smaller(config, settings, width) | ids
    for name in parts:
        part = getattr(config, name)
        is_text = part is config.get_text_config()
        settings[name] = settings[name] | _smaller(part, settings[name], width)
        settings[name] |= ids if is_text else {}
    return settings


def _is_model(name: str, value: Any) -> bool:
    return name.endswith("_config") and isinstance(value, dict) and "model_type" in value


def _smaller(config: Any, settings: dict[str, Any], width: int) -> dict[str, Any]:
    """New values of those sizes that a configuration has, by the names that it has them under."""
    heads = settings.get("num_attention_heads") or HEADS
    groups = max(1, round(HEADS * (settings.get("num_key_value_heads") or heads) / heads))
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": groups,
        "head_dim": width // HEADS,
        "query_pre_attn_scalar": width // HEADS,
        "sliding_window": WINDOW,
        "max_window_layers": LAYERS,
        "moe_intermediate_size": width,
        "num_local_experts": EXPERTS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    }
    names = getattr(config, "attribute_map", {})
    found = {names.get(name, name): size for name, size in sizes.items()}
    smaller: dict[str, Any] = {
        name: size for name, size in found.items() if settings.get(name) is not None
    }
    if settings.get("layer_types"):
        smaller["layer_types"] = _some_of_each(settings["layer_types"])
    return smaller


def _some_of_each(kinds: list[str]) -> list[str]:
    """Kinds of layers in their order, for LAYERS layers."""
    return (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS]


def build(origin: Original, width: int, ids: dict[str, Any], seed: int) -> Any:
    """A model of random weights, in the bfloat16 that such models are published in."""
    try:
        config = type(origin.config).from_dict(cut(origin.config, width, ids))
        set_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    except Exception as error:
        raise ValueError(f"there is no miniature of {origin.name!r}: {error}") from error
