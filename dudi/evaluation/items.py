"""Rows of a task as items: texts, language, choices; and a hash of them all.

The hash is of what is asked and what counts as right, so that runs are compared on the same items
or not at all.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dudi.evaluation.sources import Absent, Fields, read_rows
from dudi.evaluation.task import Rows, Task
from dudi.evaluation.templates import evaluated, rendered
from dudi.rows import Example, language_of
from dudi.verbalize import LANGUAGE_NAMES, normalise

ALL = "all"  # the label of rows without a language


class Item(NamedTuple):
    row: int  # of the source
    language: str
    group: str  # items of one group are resampled together
    prompt: str
    completion: str  # "" where there are choices
    choices: tuple[str, ...] = ()
    answer: int = 0
    example: Fields | None = None  # a row as training reads it: its prompt may be a conversation


def task_items(
    task: Task, languages: Collection[str] | None = None, data_dir: str | Path | None = None
) -> list[Item]:
    """The items of a task, in the source's order.

    Raises:
        Absent: the data is not there, or has none of the languages.
        ValueError: a template that fails, with the row.
    """
    wanted = None if languages is None else {normalise(code) for code in languages}
    by_language: dict[str, list[tuple[int, Fields]]] = defaultdict(list)
    for number, fields in enumerate(read_rows(task.source, data_dir)):
        language = _language(task, number, fields)
        if wanted is None or language in wanted:
            by_language[language].append((number, fields))
    if not by_language:
        raise Absent("no rows" + ("" if wanted is None else f" in {', '.join(sorted(wanted))}"))
    items = [
        _item(task, number, fields, language)
        for language, rows in by_language.items()
        for number, fields in _chosen(rows, task.rows, language)
    ]
    return sorted(items, key=lambda item: item.row)


def _place(task: Task, number: int, what: str) -> str:
    return f"task {task.name}, row {number}: {what}"


def _language(task: Task, number: int, fields: Fields) -> str:
    if task.examples and not task.language:
        try:
            code = language_of(fields) or ""
        except TypeError as error:
            raise ValueError(_place(task, number, str(error))) from None
    else:
        known = {name: "" if value is None else value for name, value in fields.items()}
        code = rendered(_place(task, number, "language"), task.language, known).strip()
    return normalise(code) or ALL


def _chosen(
    rows: list[tuple[int, Fields]], which: Rows, language: str
) -> Sequence[tuple[int, Fields]]:
    if which.limit is None or len(rows) <= which.limit:
        return rows
    if which.seed is None:
        return rows[: which.limit]
    return random.Random(f"{which.seed} {language}").sample(rows, which.limit)


def _item(task: Task, number: int, fields: Fields, language: str) -> Item:
    known = {"language_name": LANGUAGE_NAMES.get(language, language)} | fields
    if task.examples:
        return _example(task, number, fields, language)
    prompt = rendered(_place(task, number, "prompt"), task.prompt, known)
    group = str(number)
    if task.group is not None:
        group = rendered(_place(task, number, "group"), task.group, known)
    if task.completion is not None:
        text = rendered(_place(task, number, "completion"), task.completion, known)
        if not text.strip():
            raise ValueError(_place(task, number, f"completion must not be empty, got {text!r}"))
        return Item(number, language, group, prompt, text)
    choices = _choices(task, number, known)
    return Item(number, language, group, prompt, "", choices, _answer(task, number, known, choices))


def _example(task: Task, number: int, fields: Fields, language: str) -> Item:
    names = ("prompt", "completion") if "completion" in fields else ("messages",)
    if not set(names) <= fields.keys():
        has = ", ".join(sorted(fields))
        raise ValueError(
            _place(task, number, f"must have prompt and completion, or messages; it has {has}")
        )
    row = {name: fields[name] for name in names}
    try:
        example = Example.of(row)
    except (TypeError, ValueError) as error:
        raise ValueError(_place(task, number, str(error))) from None
    group = str(number)
    if task.group is not None:
        group = rendered(_place(task, number, "group"), task.group, fields)
    return Item(number, language, group, example.prompt, example.completion, example=row)


def _choices(task: Task, number: int, fields: Fields) -> tuple[str, ...]:
    place = _place(task, number, "choices")
    if isinstance(task.choices, str):
        given = evaluated(place, task.choices, fields)
        if not isinstance(given, (list, tuple)) or not all(isinstance(c, str) for c in given):
            raise ValueError(f"{place} must be a list of texts, got {given!r}")
        choices = tuple(given)
    else:
        assert task.choices is not None
        choices = tuple(rendered(place, source, fields) for source in task.choices)
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise ValueError(f"{place} must be two texts at least, none empty, got {choices!r}")
    return choices


def _answer(task: Task, number: int, fields: Fields, choices: tuple[str, ...]) -> int:
    assert task.answer is not None
    place = _place(task, number, "answer")
    value = evaluated(place, task.answer, fields)
    if isinstance(value, str) and choices.count(value) == 1:
        return choices.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"{place} must be an index below {len(choices)} or the text of one choice, got {value!r}"
    )


def items_hash(items: Sequence[Item]) -> str:
    """SHA-256 of all that is asked."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def described(task: Task, items: Sequence[Item]) -> dict[str, Any]:
    """What a result says of its data."""
    return {
        "source": task.source.model_dump(exclude_none=True),
        "items": len(items),
        "sha256": items_hash(items),
    }
