"""Teachers without a body here: what they say of a sequence is looked up, or asked for.

They stand where a causal LM would. One of known states has a head and the final hidden states of
the responses; one of known tokens has the likeliest tokens of each row alone, which are the
student's own. Both come from a cache (teacher_cache.py), the second also from a server (served.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from dudi.config import DuDiConfig
from dudi.packed import Packed
from dudi_kernels import LMHead, TopKTeacher

# of a `KnownTop`: what it can't be asked for, and the value that asks for nothing
NEUTRAL = {
    "temperature": 1.0,
    "teacher_top_p": 1.0,
    "gradient_tolerance": 0.0,
    "verbalized_share": 1.0,
    "confidence_gating": 0.0,
}


class Sequence(NamedTuple):
    """In the teacher's tokens."""

    prompt: list[int]
    response: list[int]


class KnownTeacher(nn.Module):
    """`tokenizer`: where the teacher's own one lies, or None; `vocab_size`: rows of its head, None
    where only a server knows."""

    def __init__(self, tokenizer: str | None, vocab_size: int | None, what: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(_name_or_path=tokenizer or "")
        self.vocab_size, self.what = vocab_size, what

    @property
    def identity(self) -> str:
        """Another one's is another: what a run that goes on must agree with."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"{self.what} has no body to run: this needs a live teacher")


class KnownStates(KnownTeacher):
    """A teacher whose final hidden states are known."""

    @property
    def head(self) -> LMHead:
        raise NotImplementedError

    def hidden(self, packed: Packed, padding_free: bool = False) -> Tensor:  # (N, E)
        raise NotImplementedError


class Answers(NamedTuple):
    """What is known of packed sequences."""

    top: TopKTeacher  # of (N, k)
    lost: Mapping[int, str]  # segments without a usable answer, and why


class KnownTop(KnownTeacher):
    """A teacher whose likeliest tokens are known."""

    def top(self, packed: Packed) -> Answers:
        """The rows of what is `lost` are any that are valid."""
        raise NotImplementedError


def sequences(packed: Packed) -> Iterator[Sequence]:
    """What was packed, in the order of the groups: that of rows before `packed.order`."""
    for group in packed.groups:
        for ids, seen, rows in zip(*(t.cpu() for t in group), strict=True):
            whole = ids[seen.bool()].tolist()
            start = len(whole) - int(rows.sum())
            yield Sequence(whole[:start], whole[start:])


def check_known(teacher: KnownTop, mapped: bool, args: DuDiConfig, size: int) -> None:
    """Raise ValueError for what can't be had of a teacher's likeliest tokens.

    mapped: whether anything lies between its tokens and the student's, whose head has `size` rows.
    """
    for name, wanted in NEUTRAL.items():
        if getattr(args, name) != wanted:
            raise ValueError(
                f"{name} must be {wanted} with {teacher.what}, whose likeliest tokens alone are "
                f"known, got {getattr(args, name)}"
            )
    if args.teacher_temperature not in (None, 1.0):
        raise ValueError(
            f"teacher_temperature must be 1 with {teacher.what}, got {args.teacher_temperature}"
        )
    if args.preference_weight > 0 and args.reference == "teacher":
        raise ValueError(f"reference must not be 'teacher' with {teacher.what}: use initial")
    if mapped:
        raise ValueError(
            f"{teacher.what} must have the student's tokenizer, and there must be no lexicon or "
            "other map of the vocabularies: its likeliest tokens are compared as they are"
        )
    if (teacher.vocab_size or 0) > size:
        raise ValueError(
            f"{teacher.what} was cached for a head of {teacher.vocab_size} rows at least, the "
            f"student's has {size}"
        )
