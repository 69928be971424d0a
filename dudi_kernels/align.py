"""Which rows of two tokenizations of one response stand at the same byte of it.

Row i of a response predicts its token i from the tokens before. Where a student token and a teacher
token start at the same byte, both models have read the same text and predict what comes next: these
rows pair. Row 0 pairs with row 0, both see the prompt alone; the end of sequence pairs with itself.
Linear in the tokens: a byte offset is looked up in a table of the other side's starts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi_kernels.scalars import INTEGERS, number
from dudi_kernels.vocabulary.token_bytes import read

Ids = Sequence[int] | Tensor
MAX_MISMATCH = 0.1  # tokenizers that normalize are expected to differ now and then, not always
NAMED = 5  # so many sequences an error lists


class Alignment(NamedTuple):
    """The rows that pair, for each sequence of a batch."""

    student_rows: list[Tensor]  # (P_b,) int64 each, rising
    teacher_rows: list[Tensor]  # (P_b,) int64 each, rising: row i pairs with row i above
    share: Tensor  # (B,) float64: paired rows of the student / its rows; 0 where there are none
    differs: list[int]  # sequences whose bytes are not the same: no row of theirs is paired


class Tokens(NamedTuple):
    """What aligning needs to know of a tokenizer."""

    bytes: Sequence[bytes | None]  # by id; None: no text
    eos: frozenset[int] = frozenset()
    adds_space: bool = False  # a response that begins with " x" may stand for "x"

    @classmethod
    def of(cls, tokenizer: Any, eos: Collection[int] | None = None) -> Tokens:
        """Of a fast tokenizer. `eos`: ids that end a response, by default the tokenizer's own."""
        vocabulary = read(tokenizer)
        if eos is None:
            own = vocabulary.roles.get("eos")
            eos = [] if own is None else [own]
        return cls(vocabulary.bytes, frozenset(eos), vocabulary.adds_space)


class Aligner(NamedTuple):
    """Both tables, to be made once: `align_responses` in a loop."""

    student: Tokens
    teacher: Tokens

    def __call__(
        self,
        student_ids: Sequence[Ids],
        teacher_ids: Sequence[Ids],
        *,
        max_mismatch: float = MAX_MISMATCH,
    ) -> Alignment:
        """See `align_responses`."""
        number("max_mismatch", max_mismatch, 0, 1)
        students = _sequences("student_ids", student_ids)
        teachers = _sequences("teacher_ids", teacher_ids)
        if len(students) != len(teachers):
            raise ValueError(
                f"teacher_ids must have {len(students)} sequences as student_ids, got "
                f"{len(teachers)}"
            )
        pairs = [self._rows(s, t) for s, t in zip(students, teachers, strict=True)]
        differs = [i for i, pair in enumerate(pairs) if pair is None]
        _check_mismatch(differs, len(pairs), max_mismatch)
        empty = torch.zeros(0, dtype=torch.long)
        rows = [pair or (empty, empty) for pair in pairs]
        shares = [len(own) / max(len(s), 1) for (own, _), s in zip(rows, students, strict=True)]
        return Alignment(
            student_rows=[own for own, _ in rows],
            teacher_rows=[other for _, other in rows],
            share=torch.tensor(shares, dtype=torch.float64),
            differs=differs,
        )

    def _rows(self, student: list[int], teacher: list[int]) -> tuple[Tensor, Tensor] | None:
        """The pairs of one sequence, or None if the bytes differ."""
        own, other = _split(student, self.student), _split(teacher, self.teacher)
        if own is None or other is None:
            return None
        own, other = _without_added_space(own, other, self.student, self.teacher)
        if b"".join(own.parts) != b"".join(other.parts):
            return None
        student_rows, teacher_rows = _same_starts(own.parts, other.parts)
        if own.ends and other.ends:  # nothing but eos starts at the last byte
            student_rows.append(len(own.parts))
            teacher_rows.append(len(other.parts))
        return torch.tensor(student_rows, dtype=torch.long), torch.tensor(
            teacher_rows, dtype=torch.long
        )


def align_responses(
    student_ids: Sequence[Ids],  # B sequences of their own lengths
    teacher_ids: Sequence[Ids],  # B sequences of their own lengths
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_eos: Collection[int] | None = None,
    teacher_eos: Collection[int] | None = None,
    max_mismatch: float = MAX_MISMATCH,
) -> Alignment:
    """Pairs the rows of two tokenizations of the same responses.

    Replaces, byte-exactly and in linear time::

        student_at = [len(decode(student_ids[:i])) for i in range(len(student_ids))]
        teacher_at = [len(decode(teacher_ids[:j])) for j in range(len(teacher_ids))]
        pairs = [(i, teacher_at.index(a)) for i, a in enumerate(student_at) if a in teacher_at]

    Args:
        student_ids, teacher_ids: the ids of each response, without its prompt and without padding:
            nothing can pair across that boundary. Lists or tensors of one dimension.
        student_tokenizer, teacher_tokenizer: see `token_bytes`. A loop makes
            `Aligner(Tokens.of(student_tokenizer), Tokens.of(teacher_tokenizer))` once and calls it.
        student_eos, teacher_eos: ids that may end a response, by default each tokenizer's own eos.
            They pair with each other, whatever their spelling, if both responses end with one.
        max_mismatch: the share of sequences whose bytes may differ.

    Returns:
        An `Alignment`. A boundary within a character counts where both sides have it. The space
        that a SentencePiece tokenizer puts before a text is not counted. Rows of tokens without
        bytes are not paired. A sequence's bytes differ if the texts do (a tokenizer that
        normalizes), or if it has another special token, or an id that is no token; none of its rows
        is paired, `differs` names it.

    Raises:
        TypeError: ids that are not integers.
        ValueError: batches of unequal size, negative ids, or more sequences than `max_mismatch`
            allows whose bytes differ.
    """
    aligner = Aligner(
        Tokens.of(student_tokenizer, student_eos), Tokens.of(teacher_tokenizer, teacher_eos)
    )
    return aligner(student_ids, teacher_ids, max_mismatch=max_mismatch)


class _Response(NamedTuple):
    parts: list[bytes]  # of each token but a last eos
    ends: bool  # with eos


def _sequences(name: str, given: Sequence[Ids]) -> list[list[int]]:
    return [_ids(f"{name}[{i}]", ids) for i, ids in enumerate(given)]


def _ids(name: str, given: Ids) -> list[int]:
    ids = torch.as_tensor(given)
    if ids.ndim != 1:
        raise ValueError(f"{name} must be one sequence of ids, got shape {tuple(ids.shape)}")
    if len(ids) and ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if len(ids) and int(ids.min()) < 0:
        row = int((ids < 0).nonzero()[0])
        raise ValueError(f"{name} must not be negative, got {int(ids[row])} at row {row}")
    return ids.tolist()


def _split(ids: list[int], tokens: Tokens) -> _Response | None:
    """The bytes of each token; None if one has no text."""
    ends = bool(ids) and ids[-1] in tokens.eos
    if ends:
        ids = ids[:-1]
    table = tokens.bytes
    known = [table[i] if i < len(table) else None for i in ids]
    parts = [part for part in known if part is not None]
    return _Response(parts, ends) if len(parts) == len(known) else None


def _without_added_space(
    own: _Response, other: _Response, student: Tokens, teacher: Tokens
) -> tuple[_Response, _Response]:
    """Where one side has a first space more, and its tokenizer puts one there: without it."""
    more = sum(map(len, own.parts)) - sum(map(len, other.parts))
    if more == 1 and student.adds_space:
        own = _strip_space(own)
    elif more == -1 and teacher.adds_space:
        other = _strip_space(other)
    return own, other


def _strip_space(response: _Response) -> _Response:
    first = response.parts[0]
    return response._replace(parts=[first.removeprefix(b" "), *response.parts[1:]])


def _same_starts(own: list[bytes], other: list[bytes]) -> tuple[list[int], list[int]]:
    """Rows whose tokens start at the same byte, in one walk over both."""
    student_rows, teacher_rows = [], []
    starts = _rows_by_start(other)
    at = 0
    for row, part in enumerate(own):
        if part and (partner := starts.get(at)) is not None:
            student_rows.append(row)
            teacher_rows.append(partner)
        at += len(part)
    return student_rows, teacher_rows


def _rows_by_start(parts: list[bytes]) -> dict[int, int]:
    starts, at = {}, 0
    for row, part in enumerate(parts):
        if part:
            starts[at] = row
        at += len(part)
    return starts


def _check_mismatch(differs: list[int], count: int, most: float) -> None:
    if len(differs) <= most * count:
        return
    some = ", ".join(map(str, differs[:NAMED])) + (", ..." if len(differs) > NAMED else "")
    raise ValueError(
        f"responses must have the same bytes in both tokenizations, but for a share of {most}: "
        f"{len(differs)} of {count} differ (sequences {some})"
    )
