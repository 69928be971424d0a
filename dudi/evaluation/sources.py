"""Rows of a task's source: files and Hub datasets by `dudi.data.load_data`, the embedded strings,
and what `dudi eval-data` has fetched. What is not there raises `Absent` with the reason."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dudi.data import holds_one_split, load_data
from dudi.demo_data import translation_rows
from dudi.evaluation.packages import default_folder
from dudi.evaluation.task import Source

Fields = dict[str, Any]
CHOICES = 4


class Absent(Exception):
    """Data that is not here; the message says why and how to get it."""


def read_rows(source: Source, data_dir: str | Path | None) -> list[Fields]:
    """All rows of a source, as fields."""
    if source.file is not None:
        return _rows_of(source.file, source.config, source.split)
    if source.dataset is not None:
        return _rows_of(source.dataset, source.config, source.split)
    match source.builtin:
        case "ui_strings":
            return ui_strings(source.split or "test")
        case "ui_choices":
            return with_distractors(ui_strings(source.split or "test"), source.seed)
        case name:
            return _fetched(str(name), default_folder() if data_dir is None else Path(data_dir))


def _rows_of(name: str, config: str | None, split: str | None) -> list[Fields]:
    chosen = split or ("train" if holds_one_split(name) else "test")
    return list(load_data(name, name=config, split=chosen))


def ui_strings(split: str) -> list[Fields]:
    """Translations of the embedded strings: instruction, text, reference, language, source, key."""
    return [
        {
            "instruction": row["prompt"][0]["content"],
            "reference": row["completion"][0]["content"],
            "language": row["language"],
            "source": row["source"],
            "key": row["key"],
        }
        for row in translation_rows(split)
    ]


def with_distractors(rows: Iterable[Fields], seed: int) -> list[Fields]:
    """Each row with `options`, its reference among three others of its language and split, and
    `index`, where it is; drawn by seed, language and key, so that no row depends on another."""
    rows = list(rows)
    texts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        texts[row["language"]].add(row["reference"])
    found = []
    for row in rows:
        draw = random.Random(f"{seed} {row['language']} {row['source']} {row['key']}")
        others = sorted(texts[row["language"]] - {row["reference"]})
        options = [row["reference"], *draw.sample(others, min(CHOICES - 1, len(others)))]
        draw.shuffle(options)
        found.append(row | {"options": options, "index": options.index(row["reference"])})
    return found


def _fetched(name: str, folder: Path) -> list[Fields]:
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise Absent(f"{path} is not there: `dudi eval-data` fetches it")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
