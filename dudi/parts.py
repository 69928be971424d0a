"""Work that is shared, killed and resumed: batches of prompts, each of which becomes a small file.

FILE.parts/ has the settings that decide what is written, and a JSON-lines file for each batch that
is done, written under another name and renamed. A part says which rows it is of, and is checked.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = "settings.json"
Lines = list[dict[str, Any]]
Tell = Callable[[int, int], None]  # batches done, batches to do


class Asked(NamedTuple):
    """One prompt to answer."""

    row: int  # the first row of the data that has it
    ids: list[int]  # what the teacher reads


def parts_of(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def part_path(parts: Path, index: int) -> Path:
    return parts / f"{index:06d}.jsonl"


def write_whole(path: Path, text: str) -> None:
    """As `write_text`, for several processes that may write one file."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def begin_parts(parts: Path, settings: dict[str, Any]) -> None:
    """The folder of the batches: a new one, or one that was made with these settings."""
    path = parts / SETTINGS
    if not path.exists():
        parts.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False))
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        changed = [n for n in sorted(settings | there) if settings.get(n) != there.get(n)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what `dudi respond` writes: {error}") from error
    if changed:
        told = ", ".join(f"{n} was {there.get(n)!r}, is {settings.get(n)!r}" for n in changed)
        raise ValueError(
            f"{parts} holds responses made otherwise ({told}): remove it to start anew"
        )


def fill_parts(
    parts: Path,
    batches: Sequence[list[Asked]],
    write: Callable[[Sequence[Asked], int], Lines],
    shard: tuple[int, int],
    tell: Tell | None = None,
) -> int:
    """Write this shard's batches, those that are there excepted; how many it wrote."""
    i, n = shard
    left = [b for b in range(i - 1, len(batches), n) if not part_path(parts, b).exists()]
    for done, index in enumerate(left, 1):
        lines = write(batches[index], index)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(part_path(parts, index), text)
        if tell is not None:
            tell(done, len(left))
    return len(left)


def read_part(path: Path, batch: Sequence[Asked], samples: int) -> Lines:
    """The lines of one batch, which must be of its prompts and all there."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        whole = [line["row"] for line in lines] == [a.row for a in batch for _ in range(samples)]
        texts = all(isinstance(line["text"], str) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error!r}): remove it and run again") from error
    if not whole or not texts:
        raise ValueError(
            f"{path} does not hold the responses of its batch: remove it and run again"
        )
    return lines
