"""Whether a text is in the language that was asked for: by its script, or by an identifier.

Thai, Lao, Khmer, Burmese and Tamil have scripts of their own here: at least half of a text's
letters must be of it. Languages in Latin letters must be in these, and are told apart by py3langid
among plausible candidates. Indonesian and Malay are too close in short texts and count as one, as
do Javanese and Sundanese, which the identifier does not know. `Judge.reason` says why a language
can't be judged.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from copy import copy
from functools import lru_cache
from typing import Any

SCRIPTS = {"th": "THAI", "lo": "LAO", "km": "KHMER", "my": "MYANMAR", "ta": "TAMIL"}
CANDIDATES = ("en", "id", "ms", "vi", "tl", "jv")  # of the identifier, for Latin letters
TOGETHER = ({"id", "ms"}, {"jv", "su"})  # what it can't tell apart
CODES = {"fil": "tl"}  # ours to the identifier's
MOSTLY = 0.5  # of the letters


def script_of(letter: str) -> str:
    """The first word of its name in Unicode: THAI, LATIN, ..."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def letters(text: str) -> Counter[str]:
    """Letters and combining marks by script."""
    return Counter(script_of(c) for c in text if unicodedata.category(c)[0] in "LM")


def mostly(text: str, script: str) -> bool:
    counts = letters(text)
    return bool(counts) and counts[script] >= MOSTLY * sum(counts.values())


@lru_cache(maxsize=1)
def whole_identifier() -> Any:
    """py3langid's model of all its languages; None where the package is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identifier(languages: tuple[str, ...]) -> Any:
    """The model, restricted to some languages; the tables are shared."""
    found = copy(whole_identifier())
    found.set_languages(languages)
    return found


class Judge:
    """Of one language; `reason` says why it can't be judged, "" where it can."""

    def __init__(self, language: str) -> None:
        self.code = CODES.get(language.partition("-")[0], language.partition("-")[0])
        self.accepted = next((group for group in TOGETHER if self.code in group), {self.code})
        latin = "LATIN" if self.accepted & set(CANDIDATES) else ""
        self.script = SCRIPTS.get(self.code, latin)  # "" where it is not known
        self.reason = ""
        self.identify: Any = None
        if self.code not in SCRIPTS:
            self.reason = self._prepare(language)

    def _prepare(self, language: str) -> str:
        if whole_identifier() is None:
            return f"{language} needs py3langid, which is not installed (pip install 'dudi[eval]')"
        known = self.accepted & set(whole_identifier().nb_classes)
        if not known:
            return f"{language} is not among the languages of py3langid"
        self.identify = identifier(tuple(sorted({*CANDIDATES, *known})))
        return ""

    def counts(self, text: str) -> bool:
        """Whether a reference says anything of a language: one without letters does not."""
        return bool(letters(text))

    def faithful(self, text: str) -> bool:
        """Whether a text is in the language; one without letters is not."""
        if self.script and not mostly(text, self.script):
            return False
        if self.identify is None:
            return True
        return bool(letters(text)) and self.identify.classify(text)[0] in self.accepted
