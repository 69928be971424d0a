"""Lexicons: what means the same in two languages, as a file and as a map between vocabularies.

A file has a pivot word, a target word and a language code a line, separated by tabs. Lines that
start with # and a first line "pivot, target, language" are passed over. `dudi lexicon` writes such
files (lexicon_build.py); `lexicon_verbalizer` makes of one what the loss reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dudi.callbacks import write_text
from dudi.verbalize import codes, normalise
from dudi_kernels import Verbalizer

HEADER = ("pivot", "target", "language")


class Entry(NamedTuple):
    """A line of a lexicon."""

    pivot: str
    target: str
    language: str  # of the target word; `dudi.verbalize.normalise` of what the file has


# ---- the file ------------------------------------------------------------------------------------


def read_lexicon(path: str | Path, languages: Collection[str] | None = None) -> list[Entry]:
    """The entries of a file, in its order. Replaces, with checks,

        [Entry(*line.split("\\t")) for line in open(path)]

    Args:
        path: UTF-8, tab-separated.
        languages: codes that the data has; None where it does not say. zh in the lexicon is there
            where the data has zh-Hant.

    Raises:
        ValueError: a file that is missing or empty, a line (which is named) that is not UTF-8 or
            not three texts, languages that the data lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"lexicon {str(path)!r} does not exist")
    entries: list[Entry] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        fields = _fields(f"{path}, line {number}", line.removeprefix(b"\xef\xbb\xbf"))
        is_header = not entries and tuple(field.lower() for field in fields) == HEADER
        if fields and not is_header:
            entries.append(Entry(fields[0], fields[1], normalise(fields[2])))
    if not entries:
        raise ValueError(f"lexicon {str(path)!r} must have an entry, got none")
    _check_languages(path, entries, languages)
    return entries


def _fields(place: str, line: bytes) -> list[str]:
    """The three texts of a line; nothing of a comment or an empty line."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: must be UTF-8, got {error.reason}") from None
    if not text.strip() or text.startswith("#"):
        return []
    fields = [field.strip() for field in text.split("\t")]
    if len(fields) != len(HEADER) or not all(fields):
        raise ValueError(
            f"{place}: must be a pivot word, a target word and a language code, separated by tabs, "
            f"got {text!r}"
        )
    return fields


def _check_languages(
    path: Path, entries: Iterable[Entry], languages: Collection[str] | None
) -> None:
    if languages is None:
        return
    known = {code for language in languages for code in codes(language)}
    if absent := sorted({entry.language for entry in entries} - known):
        raise ValueError(
            f"lexicon {str(path)!r} must have languages of the data, got {', '.join(absent)}; the "
            f"data has {', '.join(sorted(map(normalise, languages))) or 'none'}"
        )


def write_lexicon(path: str | Path, entries: Iterable[Entry], comment: str = "") -> None:
    """The file that `read_lexicon` reads, whole or not at all; `comment` stands at its head."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += ["\t".join(fields) for fields in (HEADER, *entries)]
    write_text(Path(path), "\n".join(lines) + "\n")


# ---- the map -------------------------------------------------------------------------------------


def lexicon_verbalizer(
    entries: Iterable[Entry],
    teacher: Any,  # tokenizers
    student: Any,
    base: Verbalizer,  # what holds for all other tokens
    *,
    kind: str = "lexicon",
    share: float = 0.5,
) -> Verbalizer:
    """The map of a lexicon, on top of that between the vocabularies. Replaces

        pairs = [(entry.pivot, entry.target) for entry in entries]
        Verbalizer.from_lexicon(pairs, teacher, student, base=base, share=share)  # "lexicon"
        Verbalizer.from_concepts(groups_by_pivot(pairs), teacher, student, base=base)  # "concepts"

    The map is one for all rows: languages are told apart by the words alone. With "concepts" a
    pivot word and its translations are a class; a token that begins words of several concepts
    belongs to the one that comes first in the lexicon.

    Raises:
        ValueError: an unknown `kind`, or a lexicon no word of which the tokenizers can tell.
    """
    pairs = [(entry.pivot, entry.target) for entry in entries]
    try:
        if kind == "lexicon":
            return Verbalizer.from_lexicon(pairs, teacher, student, base=base, share=share)
        if kind == "concepts":
            groups = _concepts(pairs)
            return Verbalizer.from_concepts(groups, teacher, student, base=base, clash="first")
    except ValueError as error:
        raise ValueError(f"lexicon: {error}") from error
    raise ValueError(f"kind must be lexicon or concepts, got {kind!r}")


def _concepts(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Each pivot word with its translations, in the order in which they are named."""
    groups: dict[str, list[str]] = {}
    for pivot, target in pairs:
        groups.setdefault(pivot, [pivot]).append(target)
    return list(groups.values())
