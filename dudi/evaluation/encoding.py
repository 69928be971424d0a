"""Texts of an item as token ids, read as training reads them (rows.py), for student and teacher.

An empty prompt is the tokenizer's BOS, or its EOS where it has none: something must stand before
the first token that is scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dudi.rows import Example, Prompt, Reader, student_ids


@dataclass(frozen=True)
class Encoder:
    """Rows for `Scorer`: prompt_ids, plain_prompt_ids (the teacher's tokens), completion_ids."""

    student: Reader
    teacher: Reader | None = None  # where it has another tokenizer
    max_completion_length: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        teacher_tokenizer: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
    ) -> Encoder:
        switches = dict(chat_template_kwargs or {})
        other = None
        if teacher_tokenizer is not None and teacher_tokenizer is not tokenizer:
            other = Reader(teacher_tokenizer, switches, max_prompt_length)
        student = Reader(tokenizer, switches, max_prompt_length)
        return cls(student, other, max_completion_length)

    def row(
        self, prompt: str, completion: str, *, chat: bool, ends: bool, example: Any = None
    ) -> dict[str, Any]:
        """Also `text`, what the ids of the completion spell, and `left_out`, how many tokens the
        limits cut of what. `example`: a row as training reads it, in place of prompt and
        completion."""
        own = Example.of(example) if example else _example(prompt, completion, self._chats(chat))
        asked, whole = self._student(own)
        if not ends:
            whole = self._unended(whole, own.prompt_messages is not None)
        ids = whole[: self.max_completion_length]
        if not ids:
            raise ValueError(f"completion must give at least one token, got {completion!r}")
        text = completion
        if len(ids) < len(whole):
            text = self.student.tokenizer.decode(ids, skip_special_tokens=True)
        plain = asked
        left_out = {
            "prompt_left_out": asked.left_out,
            "completion_left_out": len(whole) - len(ids),
        }
        if self.teacher is not None:
            seen = own if example else _example(prompt, completion, chat and self.teacher.chats)
            plain = self._teacher(self.teacher, seen)
            left_out["teacher_prompt_left_out"] = plain.left_out
        return {
            "prompt_ids": asked.ids,
            "plain_prompt_ids": plain.ids,
            "completion_ids": ids,
            "text": text,
            "left_out": left_out,
        }

    def _unended(self, ids: list[int], chats: bool) -> list[int]:
        """Without EOS and, of a chat template, the end of its turn before that."""
        ids = ids[:-1]

        def spelt(some: list[int]) -> str:
            return str(self.student.tokenizer.decode(some, skip_special_tokens=True)).rstrip()

        while chats and len(ids) > 1 and spelt(ids[:-1]) == spelt(ids):
            ids = ids[:-1]
        return ids

    def _chats(self, chat: bool) -> bool:
        return chat and self.student.chats

    def _student(self, example: Example) -> tuple[Prompt, list[int]]:
        if example.prompt_messages is None and not example.prompt:
            eos = self.student.tokenizer.eos_token_id
            return _begin(self.student), [*self.student.ids(example.completion), eos]
        return student_ids(self.student, example)

    def _teacher(self, reader: Reader, example: Example) -> Prompt:
        messages = example.prompt_messages
        if messages is not None:
            return reader.shortened(reader.chat_prompt(messages), messages)
        if not example.prompt:
            return _begin(reader)
        return reader.shortened(reader.text_prompt(example.prompt), None)


def _example(prompt: str, completion: str, chat: bool) -> Example:
    if not chat:
        return Example.of({"prompt": prompt, "completion": completion})
    return Example.of(
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
    )


def _begin(reader: Reader) -> Prompt:
    bos = reader.tokenizer.bos_token_id
    return Prompt([reader.tokenizer.eos_token_id if bos is None else bos])
