"""A row of data as texts and messages, and in token ids: what the student reads and writes, and
what the teacher reads in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2

from dudi.verbalize import CONTEXT_FIELDS, ContextVerbalizer, Message

Row = Mapping[str, Any]


class Example(NamedTuple):
    """A row, checked: its texts, and its messages where it is a conversation."""

    prompt: str  # of a conversation: the last user turn
    completion: str
    prompt_messages: list[dict[str, Any]] | None
    completion_message: dict[str, Any] | None

    @classmethod
    def of(cls, row: Row) -> Example:
        if "prompt" in row and "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                if not isinstance(completion, str):
                    got = _describe(completion)
                    raise TypeError(f"completion must be text like prompt, got {got}")
                return _checked(cls(prompt, completion, None, None))
            if not isinstance(prompt, Sequence):
                raise TypeError(
                    f"prompt must be text or a list of messages, got {_describe(prompt)}"
                )
            before, answers = _messages(prompt, "prompt"), _messages(completion, "completion")
            if len(answers) != 1:
                raise ValueError(
                    f"completion must hold one message, got {len(answers)}; earlier turns belong "
                    "to prompt"
                )
        else:
            turns = _messages(row["messages"], "messages")
            before, answers = turns[:-1], turns[-1:]
            if not before:
                raise ValueError(
                    "messages must hold a prompt before the last turn, got one message"
                )
        if answers[0]["role"] != "assistant":
            raise ValueError(
                f"the last turn must have the role 'assistant', got {answers[0]['role']!r}"
            )
        if before[-1]["role"] == "assistant":
            raise ValueError("the turn before the completion must not have the role 'assistant'")
        user = [message["content"] for message in before if message["role"] == "user"]
        text = user[-1] if user else before[-1]["content"]
        return _checked(cls(text, answers[0]["content"], before, answers[0]))


def _describe(value: Any) -> str:
    return "nothing (null)" if value is None else type(value).__name__


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Messages without the nulls that Arrow adds to keys only other messages have."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a list of messages, got {_describe(value)}")
    cleaned = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"{name} must be a list of messages with a role and content, "
                f"got one that is {message!r}"
            )
        if not isinstance(message.get("content"), str):
            raise TypeError(
                f"the content of each message in {name} must be text, "
                f"got {_describe(message.get('content'))}"
            )
        cleaned.append({key: item for key, item in message.items() if item is not None})
    if not cleaned:
        raise ValueError(f"{name} must hold at least one message, got none")
    return cleaned


def _checked(example: Example) -> Example:
    if not example.completion.strip():
        raise ValueError(f"completion must not be empty, got {example.completion!r}")
    return example


def language_of(row: Row) -> str | None:
    language = row.get("language")
    if language is not None and not isinstance(language, str):
        raise TypeError(f"language must be text, got {_describe(language)}")
    return language


def _context_text(row: Row, name: str) -> str | None:
    """A verbalizer's field as text; of messages the last one's."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return _messages(value, name)[-1]["content"]
    raise TypeError(f"{name} must be text or a list of messages, got {_describe(value)}")


# ---- token ids ---------------------------------------------------------------------------------


class Prompt(NamedTuple):
    ids: list[int]
    left_out: int = 0  # tokens of its middle

    @property
    def cut(self) -> bool:
        return self.left_out > 0


@dataclass(frozen=True)
class Reader:
    """One tokenizer's way to read texts and conversations."""

    tokenizer: Any
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_length: int | None = None

    @property
    def chats(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text_prompt(self, text: str) -> list[int]:
        """With the tokenizer's BOS, once, and without the EOS that some add to every text."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if ids[-1:] == [self.tokenizer.eos_token_id] and ids[-1:] != self.ids(text)[-1:]:
            ids.pop()
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def chat_text(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                **self.chat_template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"the tokenizer's chat template refuses the row: {error}") from error

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation up to where the answer begins; without a chat template, its texts."""
        if self.chats:
            return self.ids(self.chat_text(messages, True))
        return self.text_prompt("\n\n".join(message["content"] for message in messages))

    def shortened(self, ids: list[int], messages: Sequence[Mapping[str, Any]] | None) -> Prompt:
        """Without its middle, where it is too long: what is asked stays, and so does the start of
        the answer that a chat template writes."""
        limit = self.max_prompt_length
        if limit is None or len(ids) <= limit:
            return Prompt(ids)
        begun = 0
        if messages is not None and self.chats:
            begun = len(ids) - len(self.ids(self.chat_text(messages, False)))
        if begun >= limit:
            raise ValueError(
                f"a limit of {limit} tokens leaves no room for a prompt: the chat template alone "
                f"begins the answer with {begun}"
            )
        head = min(limit // 2, limit - begun)
        return Prompt(ids[:head] + ids[len(ids) - (limit - head) :], len(ids) - limit)


def student_ids(reader: Reader, example: Example) -> tuple[Prompt, list[int]]:
    """Prompt and completion, which ends with EOS once."""
    messages = example.prompt_messages
    if messages is None:
        prompt, completion = reader.text_prompt(example.prompt), reader.ids(example.completion)
    elif reader.chats:
        prompt, completion = _conversation_ids(reader, example)
    else:
        raise ValueError(
            "the tokenizer must have a chat template for conversational rows, got none; "
            "set tokenizer.chat_template or give prompt and completion as plain text"
        )
    if not prompt:
        raise ValueError(
            "prompt must give at least one token, got an empty prompt and a tokenizer without "
            "a beginning-of-sequence token"
        )
    return reader.shortened(prompt, messages), _ends_once(reader, completion)


def _conversation_ids(reader: Reader, example: Example) -> tuple[list[int], list[int]]:
    assert example.prompt_messages is not None and example.completion_message is not None
    before = reader.chat_text(example.prompt_messages, True)
    whole = reader.chat_text([*example.prompt_messages, example.completion_message], False)
    _check_response(example.completion, whole.removeprefix(before))
    prompt, everything = reader.ids(before), reader.ids(whole)
    if everything[: len(prompt)] == prompt:
        return prompt, everything[len(prompt) :]
    if whole.startswith(before):  # one token spans the border: split it, as generation does
        rest, decode = reader.ids(whole[len(before) :]), reader.tokenizer.decode
        if decode([*prompt, *rest]) == decode(everything):
            return prompt, rest
    pairs = enumerate(zip(before, whole, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(whole)))
    raise ValueError(
        "the tokenizer's chat template must render a prompt as the start of prompt and completion; "
        f"here the prompt goes on with {before[same:][:40]!r} where the whole has "
        f"{whole[same:][:40]!r}. Set a chat template without this difference (chat_template_kwargs "
        "has its switches), or give prompt and completion as plain text"
    )


def _check_response(completion: str, rendered: str) -> None:
    """White space is the template's own affair."""
    if "".join(completion.split()) not in "".join(rendered.split()):
        raise ValueError(
            "the tokenizer's chat template loses the response: what it renders does not have "
            f"{completion[:40]!r}"
        )


def _ends_once(reader: Reader, ids: list[int]) -> list[int]:
    """The completion with EOS once, last: what a template puts after it (a newline) goes."""
    tokenizer = reader.tokenizer
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return [*ids, eos]
    end = ids.index(eos) + 1
    after = tokenizer.decode(ids[end:], skip_special_tokens=True)
    if after.strip():
        raise ValueError(
            f"completion must not hold the end-of-sequence token {tokenizer.eos_token!r} before "
            f"its end: {after[:40]!r} after it would never be generated"
        )
    return ids[:end]


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher reads before a response, in its own tokens."""

    reader: Reader
    verbalizer: ContextVerbalizer | None = None

    def plain(self, row: Row) -> Prompt:
        """What the student reads."""
        example = Example.of(row)
        messages = example.prompt_messages
        if messages is not None:
            return self._prompt(self.reader.chat_prompt(messages), messages)
        return self._prompt(self.reader.text_prompt(example.prompt), None)

    def verbalized(self, row: Row, student_completion: str) -> Prompt:
        """The verbalizer's turns in place of the last user turn; plain without a verbalizer."""
        if self.verbalizer is None:
            return self.plain(row)
        messages = self.messages(row, student_completion)
        return self._prompt(self.reader.chat_prompt(messages), messages)

    def _prompt(self, ids: list[int], messages: Sequence[Mapping[str, Any]] | None) -> Prompt:
        if not ids:
            raise ValueError(
                "prompt must give at least one token of the teacher's, got an empty prompt and a "
                "tokenizer without a beginning-of-sequence token"
            )
        return self.reader.shortened(ids, messages)

    def messages(self, row: Row, student_completion: str) -> list[dict[str, Any]]:
        """The whole conversation that the teacher reads."""
        assert self.verbalizer is not None
        example, language = Example.of(row), language_of(row)
        context = {name: _context_text(row, name) for name in CONTEXT_FIELDS}
        fields = {
            **row,
            **context,
            "prompt": example.prompt,
            "completion": example.completion,
            "student_completion": student_completion,
        }
        turns = self.verbalizer.messages(fields, language or "")
        return _in_place(example, turns)


def _in_place(example: Example, turns: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation with `turns` in place of its last user turn."""
    if example.prompt_messages is None:
        return list(turns)
    messages = example.prompt_messages
    for i in reversed(range(len(messages))):
        if messages[i]["role"] == "user":
            last = {**messages[i], **turns[-1]}  # a name, an image or what else it carries
            return [*messages[:i], *turns[:-1], last, *messages[i + 1 :]]
    raise ValueError("prompt must hold a user turn for the verbalizer to replace, got none")
