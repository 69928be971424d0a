"""A few short rows for a miniature, in the columns that its recipe's data has.

Translations of user-interface strings, one into each language of the demo, with everything that
the context verbalizer reads; languages for which a recipe brings templates get a row too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from dudi.callbacks import write_text
from dudi.demo_data import LANGUAGES, directions, instruction, translation_rows, ui_strings
from dudi.verbalize import CONTEXT_FIELDS

SHORTEST = 8  # characters of a response: some tokens
WORDS = 5  # of each language in a lexicon


def few_rows(split: str, languages: Collection[str] = (), plain: bool = False) -> list[Any]:
    """The shortest row into each language; `languages`: more of them. plain: text, no messages."""
    shortest: dict[str, dict[str, Any]] = {}
    for row in translation_rows(split):
        best = shortest.get(row["language"])
        long_enough = len(row["completion"][0]["content"]) >= SHORTEST
        if long_enough and (best is None or _size(row) < _size(best)):
            shortest[row["language"]] = row
    rows = [_with_context(row) for row in shortest.values()]
    other = sorted(set(languages) - set(shortest))
    rows += [row | {"language": code} for code, row in zip(other, rows * len(other), strict=False)]
    return [_as_text(row) for row in rows] if plain else rows


def _size(row: dict[str, Any]) -> int:
    return len(row["prompt"][0]["content"]) + len(row["completion"][0]["content"])


def _with_context(row: dict[str, Any]) -> dict[str, Any]:
    """The item in a pivot language, its answer there, and what only the teacher is told."""
    source, target = row["source"], row["language"]
    pivot = next(p for s, t, p in directions() if (s, t) == (source, target))
    text = row["prompt"][0]["content"].removeprefix(instruction(source, target))
    return {
        "prompt": row["prompt"],
        "completion": row["completion"],
        "language": target,
        "pivot_prompt": instruction(source, pivot) + text,
        "pivot_completion": row["pivot_prompt"],
        "privileged_context": "A telephone's settings.",
    }


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: row[name][0]["content"] for name in ("prompt", "completion")}


def first_row(dataset: str) -> dict[str, Any] | None:
    """Of a JSON-lines file that is here; None where it is not, or is something else."""
    path = Path(dataset).expanduser()
    if path.suffix not in (".jsonl", ".ndjson") or not path.is_file():
        return None
    with path.open(encoding="utf-8") as lines:
        line = next((text for text in lines if text.strip()), "null")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"dataset_name {dataset!r}, its first row, must hold JSON: {error}"
        ) from error
    return row if isinstance(row, dict) else None


def like(rows: list[dict[str, Any]], row: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Without what `row`, the first of the recipe's own, has not."""
    if row is None:
        return rows
    optional = ("language", *CONTEXT_FIELDS)
    return [{k: v for k, v in r.items() if k in row or k not in optional} for r in rows]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_lexicon(path: Path) -> Path:
    """Single words of the embedded strings: pivot word, target word, language."""
    lines = []
    for language in LANGUAGES:
        pairs = [
            (s["en"], s[language])
            for s in ui_strings()
            if s["en"].isalpha() and s[language] and not any(c.isspace() for c in s[language])
        ]
        lines += [f"{word}\t{translation}\t{language}\n" for word, translation in pairs[:WORDS]]
    write_text(path, "".join(lines))
    return path
