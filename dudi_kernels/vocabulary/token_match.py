"""From each teacher token to the student token that begins its text.

A token of the very same bytes; else, for whole UTF-8, the first token of the student's own
tokenization, in batches of its Rust code; else the longest student token that the bytes begin with.
All three are compared as bytes, so that half a character of one vocabulary meets its like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dudi_kernels.vocabulary import sparse
from dudi_kernels.vocabulary.sparse import Columns
from dudi_kernels.vocabulary.token_bytes import Vocabulary, plain_encoder

BATCH = 8192  # texts at once: their encodings take a few MB
NONE = -1


def by_text(
    teacher: Vocabulary,
    student: Vocabulary,
    student_tokenizer: Any,
    sizes: tuple[int, int],
    specials: Mapping[int, int],
) -> Columns:
    """The map, of heads of those sizes; tokenizers that are the same keep their ids."""
    if teacher.hash == student.hash:
        found = list(range(min(sizes)))
    else:
        found = first_tokens(teacher, student, student_tokenizer)
    for i, student_id in specials.items():
        most = min(len(found), sizes[0])
        for side, own, size in (("teacher", i, most), ("student", student_id, sizes[1])):
            if not 0 <= own < size:
                raise ValueError(f"specials must have {side} ids in [0, {size}), got {own}")
        found[i] = student_id
    ids = torch.tensor(found)
    rows = (ids >= 0).nonzero()[:, 0]
    return sparse.by_columns(rows, ids[rows], torch.ones(len(rows)), sizes[1])


def first_tokens(teacher: Vocabulary, student: Vocabulary, student_tokenizer: Any) -> list[int]:
    """The student's id for each id of the teacher, or -1."""
    ids_of = ids_by_bytes(student)
    found = [ids_of.get(text, NONE) if text else NONE for text in teacher.bytes]
    missing = [i for i, text in enumerate(teacher.bytes) if text and found[i] == NONE]
    for i, student_id in _by_encoding(missing, teacher, student, student_tokenizer):
        found[i] = student_id
    for i in missing:
        if found[i] == NONE:
            found[i] = _longest_prefix(teacher.bytes[i] or b"", ids_of)
    for i, student_id in pairs_by_role(teacher, student).items():
        found[i] = student_id
    return found


def ids_by_bytes(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The id that a tokenizer itself gives to those bytes: of several, the first that is no byte
    token, as byte fallback is for what no other token says."""
    ids_of: dict[bytes, int] = {}
    for i, text in enumerate(vocabulary.bytes):
        if text and (text not in ids_of or ids_of[text] in vocabulary.byte_tokens):
            ids_of[text] = i
    return ids_of


def pairs_by_role(teacher: Vocabulary, student: Vocabulary) -> dict[int, int]:
    """eos with eos, bos with bos, ...: what has one role only on one side stays alone."""
    shared = teacher.roles.keys() & student.roles.keys()
    return {teacher.roles[role]: student.roles[role] for role in shared}


def _by_encoding(
    ids: list[int], teacher: Vocabulary, student: Vocabulary, student_tokenizer: Any
) -> Iterator[tuple[int, int]]:
    """(teacher id, student id) where the student's tokenization of the text begins with a token
    of the text: a normalizer, or a space put before, may make it begin with something else."""
    texts = [(i, text) for i in ids if (text := _text(teacher.bytes[i])) is not None]
    if not texts:
        return
    encoder = plain_encoder(student_tokenizer)
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        encoded = encoder.encode_batch_fast([t for _, t in batch], add_special_tokens=False)
        for (i, text), encoding in zip(batch, encoded, strict=True):
            first = encoding.ids[0] if encoding.ids else NONE
            if first != NONE and is_prefix(student.bytes[first], text.encode()):
                yield i, first


def is_prefix(token: bytes | None, text: bytes) -> bool:
    return bool(token) and text.startswith(token or b"")


def _text(token: bytes | None) -> str | None:
    try:
        return token.decode() if token else None
    except UnicodeDecodeError:
        return None


def _longest_prefix(text: bytes, ids_of: dict[bytes, int]) -> int:
    lengths = range(len(text), 0, -1)
    return next((ids_of[text[:n]] for n in lengths if text[:n] in ids_of), NONE)
