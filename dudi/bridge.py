"""What lies between a teacher's vocabulary and a student's: the tokenizers, the rows that pair, the
map from one head to the other.

Nothing where both have one tokenizer and heads of one size. A padded head needs a map of what both
have; another tokenizer needs a map of tokens and a pairing of rows; a lexicon adds what words mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from dudi.known import KnownTop
from dudi.lexicon import lexicon_verbalizer, read_lexicon
from dudi.models import load_tokenizer, looks_like_a_path
from dudi.pairing import Pairing
from dudi.signals import vocab_size
from dudi_kernels import Verbalizer
from dudi_kernels.vocabulary.token_bytes import read

# One of them lies beside a model that was saved with its tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip


class Bridge(NamedTuple):
    tokenizer: Any  # the teacher's
    pairing: Pairing | None = None  # None: one tokenizer, and row i pairs with row i
    verbalizer: Verbalizer | None = None  # None: token i is token i

    def to(self, device: torch.device) -> Bridge:
        """With the map on a device; itself where it is there already."""
        v = self.verbalizer
        if v is None or v.device == device:
            return self
        return self._replace(verbalizer=v.to(device))

    @property
    def maps_tokens(self) -> bool:
        """Whether a divergence is over anything but the student's tokens as they are."""
        v = self.verbalizer
        return v is not None and v.prefix_size != v.student_size

    @property
    def fingerprint(self) -> str | None:
        """Of the map, None where there is none: what a checkpoint must agree with."""
        v = self.verbalizer
        if v is None:
            return None
        digest = hashlib.blake2b(v.unmatched.encode(), digest_size=16)
        for tensor in (v.indptr, v.teacher_ids, v.weights, v.student_class):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any] | None:
        """JSON-safe; None where token i is token i."""
        if self.verbalizer is None:
            return None
        return {
            "map": repr(self.verbalizer),
            "coverage": self.verbalizer.coverage().mass,
            "same tokenizer": self.pairing is None,
        }


class MapSettings(NamedTuple):
    """How the map is made; the fields of `DuDiConfig` of these names."""

    vocabulary_verbalizer: bool | str | None = None
    verbalizer_cache_dir: str | None = None
    unmatched: str = "bucket"
    lexicon: str | None = None
    lexicon_kind: str = "lexicon"
    lexicon_share: float = 0.5

    @classmethod
    def of(cls, args: Any) -> MapSettings:
        return cls(*(getattr(args, name) for name in cls._fields))


def build_bridge(
    student: Any,
    teacher: Any,
    student_tokenizer: Any,
    own: Any,  # the teacher's tokenizer, or its name; None: the one it was saved with
    settings: MapSettings,
    languages: Collection[str] | None = None,  # of the data
) -> Bridge:
    """What stands between these models.

    Raises ValueError, naming the argument, for a map of other tokenizers or sizes, where there
    must not be one but is needed, and for a lexicon with languages that the data lacks.
    """
    sizes = vocab_size(teacher), vocab_size(student)
    if isinstance(teacher, KnownTop):  # its likeliest tokens are the student's
        sizes = sizes[1], sizes[1]
    if own is None:
        own = _saved_with(teacher, student_tokenizer, sizes)
    elif isinstance(own, str):
        own = load_tokenizer(own, "teacher_tokenizer_name_or_path")
    same = _same(student_tokenizer, own)
    chosen = settings.vocabulary_verbalizer
    if chosen is False and (not same or sizes[0] != sizes[1]):
        what = "tokenizer" if not same else f"head of {sizes[1]} rows (the teacher's: {sizes[0]})"
        raise ValueError(
            f"vocabulary_verbalizer must not be false: the student has another {what}, which needs "
            "a map between the vocabularies"
        )
    pairing = None if same else Pairing(student_tokenizer, own)
    found = None
    if isinstance(chosen, str):
        found = _loaded(chosen, own, student_tokenizer, sizes)
    elif not same:
        found = _between(own, student_tokenizer, sizes, settings)
    elif sizes[0] != sizes[1]:
        found = Verbalizer.prefix(*sizes)
    if settings.lexicon is not None and chosen is not False:
        found = lexicon_verbalizer(
            read_lexicon(Path(settings.lexicon).expanduser(), languages),
            own,
            student_tokenizer,
            base=Verbalizer.identity(sizes[1]) if found is None else found,
            kind=settings.lexicon_kind,
            share=settings.lexicon_share,
        )
    return Bridge(own, pairing, found)


def _saved_with(teacher: Any, student_tokenizer: Any, sizes: tuple[int, int]) -> Any:
    """The tokenizer that lies beside the teacher; the student's where none does."""
    name = getattr(teacher.config, "_name_or_path", "")
    folder = Path(name).expanduser()
    if folder.is_dir():
        there = any((folder / file).is_file() for file in TOKENIZER_FILES)
    else:
        there = bool(name) and not looks_like_a_path(name)  # on the Hub
    if name and there:
        return load_tokenizer(name, "the teacher's tokenizer")
    if sizes[0] != sizes[1]:
        raise ValueError(
            "teacher_tokenizer_name_or_path must be given: the teacher comes without a tokenizer, "
            f"and its head has {sizes[0]} rows, the student's {sizes[1]}"
        )
    return student_tokenizer


def _same(student: Any, teacher: Any) -> bool:
    """Whether an id means the same to both, the end of a response included."""
    if student is teacher:
        return True
    ends = student.eos_token_id == teacher.eos_token_id
    return ends and student.get_vocab() == teacher.get_vocab()


def _loaded(path: str, teacher: Any, student: Any, sizes: tuple[int, int]) -> Verbalizer:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"vocabulary_verbalizer {path!r} does not exist")
    found = Verbalizer.load(file, teacher, student)
    for who, size, own in zip(
        ("teacher", "student"), sizes, (found.teacher_size, found.student_size), strict=True
    ):
        if own != size:
            raise ValueError(
                f"vocabulary_verbalizer {path!r} must be for the {who}'s head of {size} rows, it "
                f"is for one of {own}"
            )
    return found


def _between(
    teacher: Any, student: Any, sizes: tuple[int, int], settings: MapSettings
) -> Verbalizer:
    for who, size, tokenizer in (("teacher", sizes[0], teacher), ("student", sizes[1], student)):
        if len(tokenizer) > size and read(tokenizer).needed > size:
            raise ValueError(
                f"the {who}'s tokenizer has {len(tokenizer)} tokens, its head only {size} rows: it "
                "belongs to another model"
            )
    folder = settings.verbalizer_cache_dir
    return Verbalizer.from_tokenizers(
        teacher,
        student,
        teacher_size=sizes[0],
        student_size=sizes[1],
        unmatched=cast(Any, settings.unmatched),
        cache_dir=None if folder is None else Path(folder).expanduser(),
    )
