"""`dudi lexicon`: a lexicon of parallel rows, by how often words stand in the same rows.

`parallel_texts` reads rows of two kinds: a column for each language, or the trainer's own rows that
have both `completion` and `pivot_completion`. `build_lexicon` finds the words that belong together
(cooccurrence.py) in one language after another; `run_lexicon` writes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from dudi.cooccurrence import Limits, Splitter, word_pairs
from dudi.data import load_data
from dudi.demo_data import DEMO, LANGUAGES, data_path, split_of, ui_strings
from dudi.lexicon import Entry, write_lexicon
from dudi.models import load_tokenizer
from dudi.verbalize import normalise

DEMO_LEXICON = "demo/lexicon.tsv"
CITATION = (
    "Words that stand in the same rows: each the best of the other by log-likelihood ratio "
    "(Dunning 1993)."
)


class Parallel(NamedTuple):
    """One text in two languages."""

    pivot: str
    target: str
    language: str  # of the target


def build_lexicon(
    texts: Iterable[Parallel | tuple[str, str, str]],
    *,
    tokenizer: Any = None,
    limits: Limits = Limits(),  # noqa: B008
    progress: Callable[[str, int], None] | None = None,
) -> list[Entry]:
    """Words that translate each other, by language and from the surest on. Replaces, by hand,

        for a, b in product(words(pivot), words(target)):
            count[a, b] += 1  # then the best partner of each word, where both agree

    Texts that are the same in both languages are left out: they were not translated.

    Args:
        texts: (pivot text, its translation, language of the translation).
        tokenizer: cuts scripts without spaces between words into words; best the student's.
        limits: what a pair of words must reach.
        progress: called with each language and its number of texts when it is done.

    Raises:
        ValueError: no texts, an unspaced script without a tokenizer, or no pair that reaches the
            limits.
    """
    by_language: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pivot, target, language in texts:
        if pivot != target:
            by_language[normalise(language)].append((pivot, target))
    if not by_language:
        raise ValueError("texts must have rows in two languages, got none")
    split, entries = Splitter(tokenizer), []
    for language, rows in sorted(by_language.items()):
        found = word_pairs(rows, split, limits)
        entries += [Entry(pair.pivot, pair.target, language) for pair in found]
        if progress is not None:
            progress(language, len(rows))
    if not entries:
        rows_ = sum(map(len, by_language.values()))
        raise ValueError(f"texts must have words that recur together, got none in {rows_} rows")
    return entries


# ---- where texts come from -----------------------------------------------------------------------


def parallel_texts(
    rows: Iterable[Mapping[str, Any]], pivot: str, languages: Sequence[str] | None = None
) -> Iterator[Parallel]:
    """Pairs of texts of rows of either kind; what has no translation is left out.

    Rows with `completion`, `pivot_completion` and `language` give one pair each. Others must have a
    column `pivot` and one for each of `languages` (their columns' names).

    Raises ValueError that names the row and what it lacks.
    """
    for i, row in enumerate(rows):
        if "pivot_completion" in row:
            found = [_of_trainer(row, i)]
        elif pivot in row and languages:
            found = [_of_columns(row, i, pivot, name) for name in languages]
        else:
            wanted = f"{pivot!r} and one for each of languages" if languages else "languages named"
            raise ValueError(
                f"row {i} must have completion, pivot_completion and language, or a column "
                f"{wanted}; it has {', '.join(row)}"
            )
        yield from (texts for texts in found if texts.pivot.strip() and texts.target.strip())


def _of_trainer(row: Mapping[str, Any], i: int) -> Parallel:
    texts = (_text(row.get("pivot_completion")), _text(row.get("completion")))
    if not row.get("language") and all(texts):
        raise ValueError(f"row {i} must have a language, got {row.get('language')!r}")
    return Parallel(*texts, str(row.get("language") or ""))


def _of_columns(row: Mapping[str, Any], i: int, pivot: str, language: str) -> Parallel:
    if language not in row:
        raise ValueError(f"row {i} must have a column {language!r}, it has {', '.join(row)}")
    return Parallel(str(row[pivot] or ""), str(row[language] or ""), language)


def _text(value: Any) -> str:
    """Of messages the last one's."""
    if isinstance(value, str) or not value:
        return value or ""
    return str(value[-1]["content"])


def demo_texts(languages: Sequence[str] | None = None) -> Iterator[Parallel]:
    """The train split of the embedded strings, with English as the pivot; `languages`: of these.

    Raises ValueError for languages that they are not in.
    """
    unknown = [code for code in languages or () if code not in LANGUAGES]
    if unknown:
        raise ValueError(f"languages must be of {', '.join(LANGUAGES)}, got {', '.join(unknown)}")
    items = [item for item in ui_strings() if split_of(item["key"]) == "train"]
    return parallel_texts(items, "en", languages or LANGUAGES)


# ---- the command ---------------------------------------------------------------------------------


def run_lexicon(
    dataset_name: str,
    output: str,
    pivot: str = "en",
    languages: list[str] | None = None,
    tokenizer_name_or_path: str | None = None,
    split: str = "train",
    min_count: int = 3,
    min_dice: float = 0.5,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """What `dudi lexicon` does; returns the file that it wrote."""
    console, path = console or Console(), Path(output).expanduser()
    limits = _checked(min_count, min_dice)
    if path.exists() and not overwrite:
        raise ValueError(f"output {output!r} exists; --overwrite replaces it")
    tokenizer = tokenizer_name_or_path
    if dataset_name == DEMO:
        texts, tokenizer = list(demo_texts(languages)), str(data_path("tokenizer"))
    else:
        texts = list(parallel_texts(load_data(dataset_name, split=split), pivot, languages))
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("languages", total=len({t.language for t in texts}))
        entries = build_lexicon(
            texts,
            tokenizer=tokenizer and load_tokenizer(tokenizer, "tokenizer_name_or_path"),
            limits=limits,
            progress=lambda *done: bar.advance(task),
        )
    write_lexicon(path, entries, f"{CITATION}\n{_command(dataset_name, limits)}")
    counts = {code: sum(e.language == code for e in entries) for code in _languages(entries)}
    told = ", ".join(f"{code} {n:,}" for code, n in counts.items())
    console.print(f"[bold]lexicon[/] {len(texts):,} texts: {told}", soft_wrap=True)
    console.print(str(path), soft_wrap=True)
    return path


def _command(dataset_name: str, limits: Limits) -> str:
    return (
        f"dudi lexicon --dataset_name {dataset_name} --min_count {limits.min_count} "
        f"--min_dice {limits.min_dice}"
    )


def _languages(entries: Iterable[Entry]) -> list[str]:
    return sorted({entry.language for entry in entries})


def _checked(min_count: int, min_dice: float) -> Limits:
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    if not 0 <= min_dice <= 1:
        raise ValueError(f"min_dice must be in [0, 1], got {min_dice}")
    return Limits(min_count=min_count, min_dice=min_dice)
