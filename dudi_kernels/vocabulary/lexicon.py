"""Maps made of words, on top of a map of tokens.

A lexicon moves a share of a pivot word's mass to its translations; a concept is a class of words of
several languages; a label is a class of its words and all else is left over. Words stand for their
first tokens (`words`); the maps are `sparse.Columns` and partitions of the student's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dudi_kernels.vocabulary import sparse, words
from dudi_kernels.vocabulary.sparse import Columns
from dudi_kernels.vocabulary.token_bytes import read

Claims = Mapping[int, str]  # token id -> whose words it begins
Move = tuple[int, int]  # teacher id, student id


class Sides:
    """Both tokenizers, read once."""

    def __init__(self, teacher_tokenizer: Any, student_tokenizer: Any) -> None:
        self.teacher_tokenizer, self.student_tokenizer = teacher_tokenizer, student_tokenizer
        self.teacher, self.student = read(teacher_tokenizer), read(student_tokenizer)

    def _readers(
        self, teacher_words: Iterable[str], student_words: Iterable[str]
    ) -> tuple[words.WordReader, words.WordReader]:
        return (
            words.WordReader(self.teacher_tokenizer, self.teacher, teacher_words),
            words.WordReader(self.student_tokenizer, self.student, student_words),
        )

    def claims(self, named: Mapping[str, list[str]], first_wins: bool) -> tuple[Claims, Claims]:
        """Whose words each teacher token, and each student token, begins."""
        if not named:
            raise ValueError("there must be at least one list of words, got none")
        every = [word for group in named.values() for word in group]
        teacher, student = self._readers(every, every)
        return (
            words.claims("teacher", teacher, named, first_wins),
            words.claims("student", student, named, first_wins),
        )

    def moves(self, pairs: list[tuple[str, str]]) -> list[Move]:
        """From pivot words that are one teacher token to their translations' first tokens."""
        teacher, student = self._readers([p for p, _ in pairs], [t for _, t in pairs])
        found = {
            (pivot.id, target.id)
            for pair in pairs
            for spelling, translated in words.paired_forms(*pair)
            if (pivot := teacher.first(spelling)) is not None and pivot.whole
            if (target := student.first(translated)) is not None
        }
        if not found:
            raise ValueError(
                "pairs must have pivot words that are one token of the teacher, none of "
                f"{len(pairs)} is"
            )
        return sorted(found)


def check_pairs(pairs: Iterable[Iterable[str]]) -> list[tuple[str, str]]:
    checked = []
    for i, pair in enumerate(pairs):
        own = words.check_words(f"pairs[{i}]", pair)
        if len(own) != 2:
            raise ValueError(f"pairs[{i}] must be two words, got {len(own)}")
        checked.append((own[0], own[1]))
    return checked


def moved(
    base: Columns, moves: list[Move], share: float, teacher_size: int, student_size: int
) -> Columns:
    """A share of teacher tokens' mass goes to student tokens, evenly; columns are these."""
    givers, takers = torch.tensor(moves, device=base.ids.device).T
    counts = torch.bincount(givers, minlength=teacher_size)
    kept = torch.where(counts > 0, 1 - share, 1.0).double()
    return sparse.by_columns(
        torch.cat([base.ids, givers]),
        torch.cat([base.column, takers]),
        torch.cat([base.weights * kept[base.ids], share / counts[givers].double()]),
        student_size,
    )


def merged(
    base: Columns, teacher: Claims, student: Claims, student_size: int
) -> tuple[Columns, Tensor]:
    """Tokens of one concept share a class, all others stay; also the classes of the student."""
    shared = set(teacher.values()) & set(student.values())
    if not shared:
        raise ValueError("groups must have a concept with tokens on both sides, got none")
    class_of: dict[str, int] = {}
    for i in sorted(student):
        class_of.setdefault(student[i], i)
    device = base.ids.device
    classes = torch.arange(student_size, device=device)
    for i, concept in student.items():
        if concept in shared:
            classes[i] = class_of[concept]
    own = {i: class_of[concept] for i, concept in teacher.items() if concept in shared}
    ids = torch.tensor(list(own), device=device)
    others = ~torch.isin(base.ids, ids)
    columns = sparse.by_columns(
        torch.cat([base.ids[others], ids]),
        torch.cat([classes[base.column[others]], torch.tensor(list(own.values()), device=device)]),
        torch.cat([base.weights[others], torch.ones(len(ids), device=device)]),
        student_size,
    )
    return columns, classes


def labelled(
    labels: list[str], teacher: Claims, student: Claims, student_size: int
) -> tuple[Columns, Tensor]:
    """One class for each label's tokens, in order; also the classes of the student."""
    for side, claimed in (("teacher", teacher), ("student", student)):
        if absent := [label for label in labels if label not in claimed.values()]:
            raise ValueError(
                f"labels[{absent[0]!r}] must have a word that begins with a token of the {side}, "
                "none does"
            )
    number_of = {label: i for i, label in enumerate(labels)}
    classes = torch.full((student_size,), -1)
    classes[list(student)] = torch.tensor([number_of[label] for label in student.values()])
    columns = sparse.by_columns(
        torch.tensor(list(teacher)),
        torch.tensor([number_of[label] for label in teacher.values()]),
        torch.ones(len(teacher)),
        len(labels),
    )
    return columns, classes
