"""Which words of two languages belong together, by how often they stand in the same rows.

The score of a pair is the log-likelihood ratio of Dunning (1993, "Accurate methods for the
statistics of surprise and coincidence") of the two words' occurrence in rows. Kept is what is the
best of either word for the other, often enough, and together rather than apart (Dice). Counts and
logarithms alone: the same rows give the same pairs.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise, product
from typing import Any, NamedTuple

from dudi_kernels.vocabulary.token_bytes import plain_encoder
from dudi_kernels.vocabulary.words import UNSPACED, script

JOINERS = "\u200c\u200d"  # within a word of some scripts


class Pair(NamedTuple):
    pivot: str
    target: str
    score: float  # log-likelihood ratio


class Limits(NamedTuple):
    """What a pair must reach."""

    min_count: int = 3  # rows that have both words
    min_score: float = 10.8  # chi-squared of one degree of freedom at p = 0.001
    min_dice: float = 0.5  # 2 rows with both / (rows with one + rows with the other)


# ---- words ---------------------------------------------------------------------------------------


class Splitter:
    """Words of a text: runs of letters with their marks; in scripts without spaces between words
    (Thai, Burmese, Khmer, Lao, Chinese, ...) the tokens of `tokenizer`, whole characters alone.

    Raises ValueError at a text in such a script where there is no tokenizer.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.encoder = None if tokenizer is None else plain_encoder(tokenizer)

    def __call__(self, text: str) -> list[str]:
        words = []
        for kind, characters in groupby(text, _kind):
            run = "".join(characters)
            if kind == "spaced":
                words.append(run)
            elif kind == "unspaced":
                words.extend(self._tokens(run))
        return words

    def _tokens(self, run: str) -> Iterator[str]:
        if self.encoder is None:
            raise ValueError(
                "tokenizer must be given for scripts without spaces between words, got none and "
                f"the text {run!r}"
            )
        spans = self.encoder.encode(run, add_special_tokens=False).offsets
        shared = {end for (_, end), (start, _) in pairwise(spans) if start < end}
        for start, end in spans:
            word = run[start:end]
            # half a character is no word, nor is one letter or what begins with a mark
            if end not in shared and len(word) > 1 and unicodedata.category(word[0])[0] == "L":
                yield word


def _kind(character: str) -> str | None:
    if character in JOINERS:
        return "spaced"
    if unicodedata.category(character)[0] not in "LM":
        return None
    return "unspaced" if script(character) in UNSPACED else "spaced"


# ---- pairs ---------------------------------------------------------------------------------------


def log_likelihood_ratio(both: int, first: int, second: int, rows: int) -> float:
    """2 sum k log(k / expected k) over the four cells of rows with and without either word."""
    cells = (
        (both, first, second),
        (first - both, first, rows - second),
        (second - both, rows - first, second),
        (rows - first - second + both, rows - first, rows - second),
    )
    return 2 * sum(k * math.log(k * rows / (a * b)) for k, a, b in cells if k)


def word_pairs(
    rows: Iterable[tuple[str, str]],  # pivot text, its translation
    split: Splitter,
    limits: Limits = Limits(),  # noqa: B008
) -> list[Pair]:
    """Pairs of words, best first: each the best of the other.

    Words are counted once a row, without regard to case, and given as they are spelt most often.
    Words that are the same in both languages are left out.
    """
    texts = [(split(pivot), split(target)) for pivot, target in rows]
    written = [[pair[side] for pair in texts] for side in (0, 1)]
    sides = [[{word.casefold() for word in words} for words in side] for side in written]
    spelt = [_spellings(side) for side in written]
    counts = [Counter(word for words in side for word in words) for side in sides]
    both = _together(sides, counts, limits.min_count)
    scored = sorted(
        (
            (-log_likelihood_ratio(k, counts[0][a], counts[1][b], len(texts)), a, b)
            for (a, b), k in both.items()
            if _tied(k, counts[0][a], counts[1][b], len(texts), limits)
        )
    )
    return [
        Pair(spelt[0][a], spelt[1][b], -score)
        for score, a, b in _mutually_best(scored)
        if -score >= limits.min_score and a != b
    ]


def _spellings(side: Iterable[list[str]]) -> dict[str, str]:
    """casefolded word -> its most frequent spelling, the first in order where several are."""
    counted = Counter(word for words in side for word in words)
    found: dict[str, str] = {}
    for word, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        found.setdefault(word.casefold(), word)
    return found


def _together(
    sides: list[list[set[str]]], counts: list[Counter[str]], least: int
) -> dict[tuple[str, str], int]:
    """Rows that have both words of a pair, of words that are frequent enough."""
    kept = [{word for word, k in counted.items() if k >= least} for counted in counts]
    both: Counter[tuple[str, str]] = Counter()
    for first, second in zip(*sides, strict=True):
        both.update(product(first & kept[0], second & kept[1]))
    return {pair: k for pair, k in both.items() if k >= least}


def _tied(both: int, first: int, second: int, rows: int, limits: Limits) -> bool:
    """Whether two words stand together more than by chance, and more than apart."""
    return both * rows > first * second and 2 * both >= limits.min_dice * (first + second)


def _mutually_best(scored: list[tuple[float, str, str]]) -> Iterator[tuple[float, str, str]]:
    """Of pairs in order, best first, those that come first for both of their words."""
    seen: tuple[set[str], set[str]] = set(), set()
    for pair in scored:
        _, first, second = pair
        if first not in seen[0] and second not in seen[1]:
            yield pair
        seen[0].add(first)
        seen[1].add(second)
