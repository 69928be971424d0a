"""Configurations of the models that recipes name, at full size: what their `config.json` says.

Nothing is downloaded; `dudi plan` reads folders of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

GEMMA = {"sliding_window": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}


def _sizes(*sizes: int, tied: bool = True, **more: Any) -> dict[str, Any]:
    """vocabulary, width, width of the MLP, layers, heads, groups."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    return dict(zip(names + heads, sizes, strict=False)) | {"tie_word_embeddings": tied} | more


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", _sizes(151_936, 896, 4864, 24, 14, 2)),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", _sizes(151_936, 1536, 8960, 28, 12, 2)),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", _sizes(151_936, 2048, 11_008, 36, 16, 2)),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", _sizes(152_064, 5120, 13_824, 48, 40, 8, tied=False)),
    "Qwen/Qwen3-1.7B": ("qwen3", _sizes(151_936, 2048, 6144, 28, 16, 8)),
    "Qwen/Qwen3-8B": ("qwen3", _sizes(151_936, 4096, 12_288, 36, 32, 8, tied=False)),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", _sizes(128_256, 2048, 8192, 16, 32, 8)),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", _sizes(128_256, 3072, 8192, 28, 24, 8)),
    "aisingapore/Llama-SEA-LION-v3-8B-IT": (
        "llama",
        _sizes(128_256, 4096, 14_336, 32, 32, 8, tied=False),
    ),
    "google/gemma-3-270m-it": ("gemma3_text", _sizes(262_144, 640, 2048, 18) | GEMMA),
    "google/gemma-3-1b-it": ("gemma3_text", _sizes(262_144, 1152, 6912, 26) | GEMMA),
    "google/gemma-3-4b-it": (
        "gemma3",
        {"text_config": _sizes(262_208, 2560, 10_240, 34, 8, 4, head_dim=256, sliding_window=1024)},
    ),
}


def write(name: str, folder: Path) -> str:
    """The folder of a name's configuration, in bfloat16 as such models are published."""
    model_type, settings = MODELS[name]
    target = folder / name
    AutoConfig.for_model(model_type, dtype="bfloat16", **settings).save_pretrained(target)
    return str(target)
