"""From words to the tokens that begin them.

A word is tokenized as it occurs in text: alone, and after a space where its script puts spaces
between words. Of several tokens the first counts: that is the one to choose when the word begins.
One that is white space alone, or has no bytes, says nothing of the word and is left out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dudi_kernels.vocabulary.token_bytes import Vocabulary, plain_encoder

# Scripts without spaces between words, by the first part of their characters' names.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "KHMER", "LAO", "MYANMAR", "THAI", "TIBETAN", "BOPOMOFO")


class First(NamedTuple):
    """How a spelling begins."""

    id: int
    whole: bool  # the token is all of it


class WordReader:
    """First tokens of words in one tokenizer; `first` answers for spellings that were given."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, words: Iterable[str]) -> None:
        spellings = sorted({spelling for word in words for spelling in forms(word)})
        encoded = plain_encoder(tokenizer).encode_batch_fast(spellings, add_special_tokens=False)
        self._firsts = {
            spelling: _first(encoding.ids, vocabulary)
            for spelling, encoding in zip(spellings, encoded, strict=True)
        }

    def first(self, spelling: str) -> First | None:
        return self._firsts[spelling]

    def ids(self, word: str) -> list[int]:
        """First tokens of all forms of a word."""
        found = (self.first(spelling) for spelling in forms(word))
        return sorted({first.id for first in found if first is not None})


def claims(
    side: str, reader: WordReader, named: Mapping[str, list[str]], first_wins: bool
) -> dict[int, str]:
    """token id -> name of the words that begin with it; two names for one token are refused, or
    the first has it."""
    owner: dict[int, tuple[str, str]] = {}
    for name, group in named.items():
        for word in group:
            for i in reader.ids(word):
                theirs, other = owner.setdefault(i, (name, word))
                if theirs != name and not first_wins:
                    raise ValueError(
                        f"{name} must not share tokens with {theirs}: {side} token {i} begins "
                        f"both {word!r} and {other!r}"
                    )
    return {i: name for i, (name, _word) in owner.items()}


def _first(ids: Sequence[int], vocabulary: Vocabulary) -> First | None:
    if not ids:
        return None
    token = vocabulary.bytes[ids[0]]
    return First(ids[0], len(ids) == 1) if token and token.strip() else None


def check_words(name: str, given: object) -> list[str]:
    """A list of words, none of them empty."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a list of words, got {given!r}")
    words = list(given)
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"{name} must be words, got {word!r} at {i}")
    if not words:
        raise ValueError(f"{name} must not be empty")
    return [word.strip() for word in words]


def forms(word: str) -> tuple[str, ...]:
    """As it stands in text: at the start or after punctuation, and after a space."""
    return (word,) if script(word) in UNSPACED else (word, f" {word}")


def paired_forms(pivot: str, target: str) -> list[tuple[str, str]]:
    """A form of one word with its like of the other: where only one of the two has a form after a
    space, the other's one form serves for both."""
    left, right = forms(pivot), forms(target)
    if len(left) == len(right):
        return list(zip(left, right, strict=True))
    return [(a, b) for a in left for b in right]


def script(text: str) -> str:
    """The script of the first letter or mark (LATIN, THAI, ...), or "other" if there is none."""
    for character in text:
        if unicodedata.category(character)[0] in "LM":
            return unicodedata.name(character, "other").split()[0].split("-")[0]
    return "other"


def script_of_token(token: bytes | str | None) -> str:
    """Like `script`; "special" for None, "bytes" for half a character."""
    if token is None:
        return "special"
    try:
        return script(token.decode() if isinstance(token, bytes) else token)
    except UnicodeDecodeError:
        return "bytes"
