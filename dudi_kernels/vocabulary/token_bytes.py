"""The bytes that each token of a tokenizer stands for, read from the tokenizer's serialised form.

Byte-level BPE writes the 256 bytes as 256 printable characters; SentencePiece-style vocabularies
write a space as a mark (▁) and a lone byte as <0xNN>. The decoder says which of them it is. Special
tokens and holes stand for no text. Tokenizers are duck-typed: nothing but torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROLES = ("eos", "bos", "pad", "unk")  # in order: a token of two roles has the first
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# What decides which text gets which ids. The rest changes from call to call (padding, truncation)
# or adds special tokens around (the post-processor).
CONTENT = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
BYTE_LEVEL = {"ByteLevel", "Fuse"}
SENTENCE_PIECE = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}

Json = dict[str, Any]


class Vocabulary(NamedTuple):
    """What is known of a tokenizer's tokens; index is id."""

    bytes: list[bytes | None]  # None: special, or no token has this id
    byte_tokens: frozenset[int]  # those that are spelled <0xNN>
    adds_space: bool  # a space is put before a text that has none
    roles: dict[str, int]
    hash: str

    @property
    def needed(self) -> int:
        """Rows that a head must have at least: up to the last token that stands for text or has a
        role. Gemma-3's text models have no row for <image_soft_token>, which their tokenizer has.
        """
        spoken = (i for i, text in enumerate(self.bytes) if text is not None)
        return 1 + max([*spoken, *self.roles.values()], default=-1)


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of each token, by id.

    Replaces, exactly and also for tokens that are no valid UTF-8 by themselves::

        [tokenizer.decode([i]).encode() for i in range(len(tokenizer))]

    Args:
        tokenizer: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`: byte-level BPE
            (GPT-2, Llama 3, Qwen, converted tiktoken files) or SentencePiece-style (Llama 2, Gemma,
            T5: a space mark, with or without byte fallback).

    Returns:
        A list as long as the largest id + 1; None for special tokens, the unknown token and holes.
        Added tokens that are not special have the bytes of their text. A normalizer has no part in
        this: it changes which text is tokenized, not what a token says.

    Raises:
        TypeError: not a fast tokenizer.
        ValueError: a vocabulary of which the bytes can't be told (WordPiece, WordLevel, suffixes).
    """
    return read(tokenizer).bytes


def special_roles(tokenizer: Any) -> dict[str, int]:
    """The ids of eos, bos, pad and unk, where the tokenizer has them; a token that has several
    roles (pad is eos) is named for the first alone. A `tokenizers.Tokenizer` knows of none."""
    roles: dict[str, int] = {}
    for role in ROLES:
        found = getattr(tokenizer, f"{role}_token_id", None)
        if isinstance(found, int) and found not in roles.values():
            roles[role] = found
    return roles


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides about text, ids and roles; the same after saving and loading."""
    return _hash(_parts(tokenizer), special_roles(tokenizer))


def read(tokenizer: Any) -> Vocabulary:
    """Everything above, from one reading."""
    parts, roles = _parts(tokenizer), special_roles(tokenizer)
    spell = _spelling(parts)
    model = parts["model"]
    pieces = _pieces(model)
    added = {token["id"]: token for token in parts["added_tokens"]}
    table: list[bytes | None] = [None] * (1 + max([*pieces.values(), *added], default=-1))
    for piece, i in pieces.items():
        table[i] = spell(piece)
    for i, token in added.items():
        table[i] = None if token["special"] else token["content"].encode()
    silent = {*roles.values(), *getattr(tokenizer, "all_special_ids", ()), _unknown(model, pieces)}
    for i in silent:
        if i is not None and i < len(table):
            table[i] = None
    return Vocabulary(
        table, _byte_tokens(parts, pieces), _adds_space(parts), roles, _hash(parts, roles)
    )


def plain_encoder(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` that adds nothing to a text: no special tokens, no first space, no
    padding, and cuts nothing off."""
    parts = _parts(tokenizer)
    parts.update(truncation=None, padding=None, post_processor=None)
    for step in _steps(parts["pre_tokenizer"]):
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    parts["normalizer"] = _without_prepend(parts["normalizer"])
    return type(_backend(tokenizer)).from_str(json.dumps(parts))


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TypeError(
            "tokenizer must be a fast tokenizer of transformers or a tokenizers.Tokenizer, got "
            f"{type(tokenizer).__name__}"
        )
    return backend


def _parts(tokenizer: Any) -> Json:
    return json.loads(_backend(tokenizer).to_str())


def _steps(part: Json | None) -> Iterator[Json]:
    """A normalizer, pre-tokenizer or decoder without its sequences."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(name, ()):
            yield from _steps(inner)


def _without_prepend(part: Json | None) -> Json | None:
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] != "Sequence":
        return part
    inner = [_without_prepend(step) for step in part["normalizers"]]
    return {**part, "normalizers": [step for step in inner if step is not None]}


def _adds_space(parts: Json) -> bool:
    def adds(step: Json) -> bool:
        if step["type"] == "Metaspace" and "prepend_scheme" in step:
            return step["prepend_scheme"] != "never"
        return step["type"] == "Prepend" or bool(step.get("add_prefix_space"))

    steps = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
    return any(adds(step) for step in steps)


def _pieces(model: Json) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: i for i, (piece, _score) in enumerate(vocabulary)}  # Unigram


def _unknown(model: Json, pieces: dict[str, int]) -> int | None:
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return pieces.get(model.get("unk_token") or "")


def _byte_fallback(parts: Json) -> bool:
    kinds = {step["type"] for step in _steps(parts["decoder"])}
    return "ByteFallback" in kinds or bool(parts["model"].get("byte_fallback"))


def _byte_tokens(parts: Json, pieces: dict[str, int]) -> frozenset[int]:
    if not _byte_fallback(parts):
        return frozenset()
    return frozenset(i for piece, i in pieces.items() if BYTE_TOKEN.fullmatch(piece))


def _spelling(parts: Json) -> Callable[[str], bytes]:
    """How the pieces of this tokenizer's model are read as bytes."""
    model = parts["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(
                f"tokenizer must not mark the parts of words, got {name} {model[name]!r} "
                f"in a {model['type']} model"
            )
    steps = list(_steps(parts["decoder"] or parts["pre_tokenizer"]))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds and (parts["decoder"] is None or kinds <= BYTE_LEVEL):
        return _byte_level
    marks = {mark for step in steps if (mark := _space_mark(step)) is not None}
    known = kinds <= SENTENCE_PIECE or parts["decoder"] is None
    if known and len(marks) == 1 and "" not in marks:
        return _sentence_piece(marks.pop(), _byte_fallback(parts))
    found = "no decoder" if parts["decoder"] is None else f"a decoder of {', '.join(sorted(kinds))}"
    raise ValueError(
        "tokenizer must be byte-level BPE or SentencePiece-style (a ByteLevel, Metaspace or "
        f"ByteFallback decoder), got a {model['type']} model with {found}"
    )


def _space_mark(step: Json) -> str | None:
    """The character that a decoding step turns into a space; '' if it does something else."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    if step["type"] != "Replace":
        return None
    pattern = step["pattern"].get("String", "")
    return pattern if step["content"] == " " and len(pattern) == 1 else ""


def _printable_bytes() -> dict[int, int]:
    """Code point -> byte: GPT-2's table, where bytes that don't print are moved past 255."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printing)]
    return {byte: byte for byte in printing} | {256 + i: byte for i, byte in enumerate(moved)}


PRINTABLE = _printable_bytes()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([PRINTABLE[ord(character)] for character in piece])
    except KeyError:  # as the decoder does: a piece with any other character is text
        return piece.encode()


def _sentence_piece(mark: str, byte_fallback: bool) -> Callable[[str], bytes]:
    def spell(piece: str) -> bytes:
        byte = BYTE_TOKEN.fullmatch(piece) if byte_fallback else None
        return bytes.fromhex(byte[1]) if byte else piece.replace(mark, " ").encode()

    return spell


def _hash(parts: Json, roles: dict[str, int]) -> str:
    content = {name: parts[name] for name in CONTENT}
    merges = content["model"].get("merges")
    if merges and isinstance(merges[0], str):  # as older versions of tokenizers write them
        content["model"] = {**content["model"], "merges": [pair.split(" ") for pair in merges]}
    text = json.dumps([content, roles], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
