"""Figures as functions of sums over rows: a ratio, a calibration error, chrF++.

Each row keeps a few additive values; a figure of any set of rows, a resample too, is a function of
their sums. That is all that estimates and comparisons need (bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from sacrebleu.metrics.chrf import CHRF

from dudi.evaluation.calibration import ece, spread

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """`columns` gives the additive values of a row, `value` the figure of sums (B, S)."""

    title: str
    unit: str
    digits: int
    better: str  # lower, higher, or "" where neither is
    needs: tuple[str, ...]  # keys of rows that count
    columns: Callable[[Row], Any]
    value: Callable[[np.ndarray], np.ndarray]  # (B, S) -> (B,)
    size: Callable[[Row], float] = lambda row: 1  # what the row is of: its tokens, characters, ...
    settings: tuple[str, ...] = ()  # of an evaluation: with others the figure is of something else
    cuts: tuple[str, ...] = ("prompt_left_out",)  # of rows (cuts.py): likewise

    def counts(self, row: Row) -> bool:
        """Whether a row has what the figure is made of."""
        return all(name in row for name in self.needs)


def _ratio(
    top: str, bottom: str, *settings: str, cuts: tuple[str, ...] = ("prompt_left_out",)
) -> dict[str, Any]:
    def value(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)

    return {
        "needs": (top, bottom),
        "columns": lambda row: (row[top], row[bottom]),
        "value": value,
        "size": lambda row: row[bottom],
        "settings": settings,
        "cuts": cuts,
    }


def _ece(name: str) -> dict[str, Any]:
    return {
        "needs": (name,),
        "columns": lambda row: spread(row[name]),
        "value": ece,
        "size": lambda row: sum(own[1] for own in row[name]),
    }


@lru_cache(maxsize=1)
def chrf() -> CHRF:
    """chrF++: two orders of words beside six of characters."""
    return CHRF(word_order=2)


def chrf_counts(generation: str, reference: str) -> list[int]:
    """n-grams of the generation, of the reference, and shared, for each order."""
    return chrf()._extract_corpus_statistics([generation], [[reference]])[0]


def _chrf(sums: np.ndarray) -> np.ndarray:
    return np.array([chrf()._compute_score_from_stats(list(s)).score for s in sums])


TEACHER, LENGTH = "teacher_model_name_or_path", "max_completion_length"
BOTH = ("prompt_left_out", "teacher_prompt_left_out")

FIGURES = {
    "nll_per_char": Figure("NLL / char", "nats", 3, "lower", **_ratio("nll", "chars")),
    "nll_per_byte": Figure("NLL / byte", "nats", 3, "lower", **_ratio("nll", "bytes")),
    "nll_per_token": Figure("NLL / token", "nats", 3, "lower", **_ratio("nll", "tokens")),
    "kl_to_teacher": Figure(
        "KL to teacher", "nats a token", 3, "lower", **_ratio("kl", "taught", TEACHER, cuts=BOTH)
    ),
    "ece_tokens": Figure("ECE, tokens", "0 to 1", 3, "lower", **_ece("token_bins")),
    "chrf++": Figure(
        "chrF++", "0 to 100", 1, "higher", ("chrf",), lambda r: r["chrf"], _chrf, settings=(LENGTH,)
    ),
    "length_ratio": Figure(
        "length ratio", "1 is alike", 2, "", **_ratio("written", "reference", LENGTH)
    ),
    "fidelity": Figure("fidelity", "share", 3, "higher", **_ratio("faithful", "judged", LENGTH)),
    "fidelity_of_references": Figure(
        "fidelity of references", "share", 3, "", **_ratio("faithful_reference", "judged", cuts=())
    ),
    "accuracy": Figure("accuracy", "share", 3, "higher", **_ratio("correct", "questions")),
    "accuracy_by_bytes": Figure(
        "accuracy, by bytes", "share", 3, "higher", **_ratio("correct_by_bytes", "questions")
    ),
    "ece_choices": Figure("ECE, choices", "0 to 1", 3, "lower", **_ece("choice_bins")),
}
