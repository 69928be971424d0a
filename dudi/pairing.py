"""A response in the teacher's tokens, and which rows of both sides stand at the same byte of it.

The student's ids are the truth: what they spell is tokenized again by the teacher's tokenizer, for
given responses and samples alike. A sample may end within a character, or hold a token that spells
nothing; what comes from there on has no partner. A tokenizer that normalizes may spell a response
in other bytes: none of its rows has one then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dudi_kernels import Aligner, Tokens


class Paired(NamedTuple):
    """Of a batch of responses."""

    teacher_ids: list[list[int]]
    student_rows: list[Tensor]  # (P,) of each response, rising
    teacher_rows: list[Tensor]  # (P,) which they pair with
    differs: list[int]  # responses whose bytes the teacher's tokenizer changes


class Pairing:
    """From the student's tokens of a response to the teacher's; reads both tokenizers once."""

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        self.teacher_tokenizer = teacher_tokenizer
        self.student_eos = student_tokenizer.eos_token_id
        self.teacher_eos = teacher_tokenizer.eos_token_id
        if self.teacher_eos is None:
            raise ValueError("the teacher's tokenizer must have an end-of-sequence token, got none")
        self.aligner = Aligner(
            Tokens.of(student_tokenizer, [self.student_eos]),
            Tokens.of(teacher_tokenizer, [self.teacher_eos]),
        )

    def __call__(self, responses: Sequence[Sequence[int] | Tensor]) -> Paired:
        """Of responses in the student's ids, which may end with its eos."""
        spelt, teacher_ids = [], []
        for response in responses:
            ids = response.tolist() if isinstance(response, Tensor) else list(response)
            own, other = self._respell(ids)
            spelt.append(own)
            teacher_ids.append(other)
        found = self.aligner(spelt, teacher_ids, max_mismatch=1.0)
        return Paired(teacher_ids, found.student_rows, found.teacher_rows, found.differs)

    def _respell(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The student's ids up to what can't be spelt, and the teacher's of the same text."""
        ends = ids[-1:] == [self.student_eos]
        body = ids[:-1] if ends else ids
        text, count = self._text(body)
        if self.aligner.student.adds_space:
            text = text.removeprefix(" ")
        other = list(
            self.teacher_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )
        if ends and count == len(body):
            return ids, [*other, self.teacher_eos]
        return body[:count], other

    def _text(self, ids: list[int]) -> tuple[str, int]:
        """What the first tokens spell in whole characters, and how many tokens that is."""
        parts: list[bytes] = []
        for i in ids:
            part = self.aligner.student.bytes[i] if i < len(self.aligner.student.bytes) else None
            if part is None:
                break
            parts.append(part)
        while True:
            try:
                return b"".join(parts).decode(), len(parts)
            except UnicodeDecodeError as error:
                parts = _within(parts, error.start)


def _within(parts: list[bytes], end: int) -> list[bytes]:
    """The first tokens that end at this byte or before."""
    size = 0
    for count, part in enumerate(parts):
        size += len(part)
        if size > end:
            return parts[:count]
    return parts
