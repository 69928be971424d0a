"""Tokenizers of each kind that is understood: made here, or read from installed packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
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
from transformers import AutoTokenizer

from bench.vocabularies import TEXT_LANGUAGES, fast, qwen, qwen3_6, smollm2, tekken, texts
from dudi.demo_data import data_path

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def every_language(count: int) -> list[str]:
    return [text for language in TEXT_LANGUAGES for text in texts(language)[:count]]


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


def installed(load: Callable[[], Any]) -> Any:
    """What a package ships, or a skipped test that names it."""
    try:
        return load()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


BUILT: dict[str, Callable[[], Any]] = {
    "byte_level": trained_byte_level,
    "sentence_piece": sentence_piece,
    "metaspace": lambda: sentence_piece(metaspace=True),
    "demo": demo,
}
INSTALLED: dict[str, Callable[[], Any]] = {
    "qwen": lambda: installed(qwen),
    "qwen3_6": lambda: installed(qwen3_6),
    "tekken": lambda: installed(tekken),
    "smollm2": lambda: installed(smollm2),
}
ALL = BUILT | INSTALLED


def ids(tokenizer: Any, text: str) -> list[int]:
    """Of a text alone, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
