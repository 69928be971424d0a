"""Verbalizer: what a teacher says about its vocabulary, in the classes that a student can be asked.

Two maps onto K shared classes: the teacher's, a sparse M (U, K) with P = p M, and the student's, a
partition of its vocabulary, Q_k = sum of q_v with c(v) = k. M is stored by class: the teacher
tokens of class k and their weights lie at indptr[k]:indptr[k + 1]. Constructors make the maps from
ids, from the texts of two tokenizers (`token_match`), or from words (`lexicon`).
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dudi_kernels.classes import Classes
from dudi_kernels.scalars import SHARES, integer, number
from dudi_kernels.vocabulary import lexicon, sparse, token_match, words
from dudi_kernels.vocabulary.coverage import Coverage, coverage
from dudi_kernels.vocabulary.sparse import Columns
from dudi_kernels.vocabulary.token_bytes import Vocabulary, read, tokenizer_hash

Unmatched = Literal["bucket", "renormalize"]
UNMATCHED = ("bucket", "renormalize")
FORMAT = "1"  # of saved files
SIZES = ("teacher_size", "student_size", "num_classes")
DTYPES = {
    "indptr": torch.int64,
    "teacher_ids": torch.int64,
    "weights": torch.float32,
    "student_class": torch.int64,
}
HASHES = ("teacher_hash", "student_hash")

_KEYS = itertools.count(1)
VERBALIZERS: WeakValueDictionary[str, Verbalizer] = WeakValueDictionary()  # by their key


@dataclass(frozen=True, eq=False, repr=False)
class Verbalizer:
    """Sparse maps of a teacher's and a student's vocabulary onto K shared classes.

    Stands for::

        P = p @ M                                          # (N, U) @ (U, K)
        Q = zeros(N, K).index_add(1, student_class, q)     # over the student tokens with a class
        if unmatched == "bucket" and (student_class < 0).any():
            # one class more, of all that is left
            P = cat([P, 1 - P.sum(1)], 1); Q = cat([Q, 1 - Q.sum(1)], 1)
        else:                                              # "renormalize", or nothing to face it
            P = P / P.sum(1); Q = Q / Q.sum(1)

    A class needs tokens of both sides. One without student tokens or without teacher mass is none:
    its tokens are unmatched, and so it is stored; weights of 0 are left out. Hence every class that
    `student_class` names has at least one teacher token with a positive weight, and the reverse.

    Args:
        teacher_size: U, rows of the teacher's head.
        student_size: V, rows of the student's head.
        num_classes: K.
        indptr: (K + 1,) int64, where each class begins in the two below.
        teacher_ids: (nnz,) int64, rising within a class.
        weights: (nnz,) float32, not negative; those of a teacher token sum to at most 1.
        student_class: (V,) int64, -1 for no class; None: student token v is class v (K = V).
        unmatched: what becomes of mass that has no class, see above.
        teacher_hash, student_hash: `token_bytes.tokenizer_hash` of the tokenizers, if known.

    Raises:
        TypeError: arguments of another type.
        ValueError: shapes that don't fit, ids out of range, a token twice in a class, weights that
            are negative, NaN or more than a token has; each is named.
    """

    teacher_size: int
    student_size: int
    num_classes: int
    indptr: Tensor  # (K + 1,)
    teacher_ids: Tensor  # (nnz,)
    weights: Tensor  # (nnz,)
    student_class: Tensor = None  # type: ignore[assignment]  # (V,), there once it is made
    unmatched: Unmatched = "bucket"
    teacher_hash: str | None = None
    student_hash: str | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            integer(name, getattr(self, name), least=1)
        if self.unmatched not in UNMATCHED:
            wanted = ", ".join(UNMATCHED)
            raise ValueError(f"unmatched must be one of {wanted}, got {self.unmatched!r}")
        if self.student_class is None:
            object.__setattr__(self, "student_class", _own_classes(self))
        self._check_tensors()
        sparse.check_columns(self.columns, self.teacher_size)
        sparse.check_range("student_class", self.student_class, -1, self.num_classes)
        self._keep_two_sided()
        self._register()

    def _register(self) -> None:
        """A number for torch.compile: what is traced names the map, whose tables are made once."""
        self.__dict__["_key"] = f"verbalizer {next(_KEYS)}"  # dynamo would vary a number
        VERBALIZERS[self.key] = self

    @property
    def key(self) -> str:
        """Its name among the verbalizers of this process."""
        return self.__dict__["_key"]

    def _check_tensors(self) -> None:
        entries = len(self.teacher_ids) if isinstance(self.teacher_ids, Tensor) else 0
        lengths = (self.num_classes + 1, entries, entries, self.student_size)
        for (name, dtype), length in zip(DTYPES.items(), lengths, strict=True):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
            if tuple(value.shape) != (length,):
                got = tuple(value.shape)
                raise ValueError(f"{name} must have shape ({length},), got {got}")
            if value.device != self.indptr.device:
                wanted = self.indptr.device
                raise ValueError(f"{name} must be on {wanted} as indptr is, got {value.device}")

    def _keep_two_sided(self) -> None:
        """Classes have tokens of both sides: no divergence is infinite for want of a token."""
        taught = torch.zeros(self.num_classes, dtype=torch.bool, device=self.device)
        learnt = taught.clone()
        learnt[self.student_class[self.student_class >= 0]] = True
        kept = (self.weights > 0) & learnt[self.entry_class]
        taught[self.entry_class[kept]] = True
        alone = (self.student_class >= 0) & ~taught[self.student_class.clamp(min=0)]
        if not bool(kept.all()):
            columns = self.columns.keep(kept)
            for name, value in zip(("indptr", "teacher_ids", "weights"), columns, strict=True):
                object.__setattr__(self, name, value)
            del self.__dict__["entry_class"]
        if bool(alone.any()):
            object.__setattr__(self, "student_class", self.student_class.masked_fill(alone, -1))

    def __repr__(self) -> str:
        return (
            f"Verbalizer({self.teacher_size} -> {self.student_size}, {self.num_classes} classes, "
            f"{len(self.weights)} weights, unmatched={self.unmatched!r})"
        )

    @property
    def device(self) -> torch.device:
        return self.indptr.device

    @property
    def columns(self) -> Columns:
        """M by class."""
        return Columns(self.indptr, self.teacher_ids, self.weights)

    @cached_property
    def entry_class(self) -> Tensor:  # (nnz,)
        """The class of each weight."""
        return self.columns.column

    @cached_property
    def classes(self) -> Classes:
        """The index tables that the losses take, made on first use."""
        return Classes.of(self)

    @cached_property
    def mapped(self) -> Tensor:  # (U,) float32
        """The share of each teacher token's mass that lands on a class."""
        return self.columns.row_sums(self.teacher_size).float()

    @property
    def matched(self) -> Tensor:  # (V,) bool
        """The student tokens that are in a class."""
        return self.student_class >= 0

    @cached_property
    def prefix_size(self) -> int | None:
        """n where ids below n are the same token on both sides, whole, and no others are in a
        class; else None. One that holds all of the student's tokens slices the teacher's head."""
        n = len(self.weights)
        if n > min(self.teacher_size, self.student_size, self.num_classes):
            return None
        own = torch.arange(n, device=self.device)
        parts = (self.teacher_ids, self.indptr[:n], self.student_class[:n])
        alone = bool((self.weights == 1).all()) and not bool(self.matched[n:].any())
        return n if alone and all(torch.equal(part, own) for part in parts) else None

    @cached_property
    def one_token_each(self) -> bool:
        """Whether student token v is class v or has none."""
        if self.num_classes != self.student_size:
            return False
        own = torch.arange(self.student_size, device=self.device)
        return bool(((self.student_class == own) | ~self.matched).all())

    def to(self, device: torch.device | str) -> Verbalizer:
        """The same maps on another device."""
        moved = object.__new__(Verbalizer)
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            moved.__dict__[name] = value.to(device) if name in DTYPES else value
        moved._register()
        return moved

    def project(self, probability: Tensor) -> Tensor:  # (..., U) -> (..., K)
        """`probability @ M`: for looking at; the losses project in their sweeps."""
        if probability.shape[-1] != self.teacher_size:
            got = probability.shape[-1]
            raise ValueError(f"probability must have {self.teacher_size} columns, got {got}")
        weighted = probability[..., self.teacher_ids] * self.weights.to(probability.dtype)
        out = probability.new_zeros(*probability.shape[:-1], self.num_classes)
        return out.index_add_(-1, self.entry_class, weighted)

    @classmethod
    def identity(cls, size: int, *, unmatched: Unmatched = "bucket") -> Verbalizer:
        """Each of `size` tokens is its own class on both sides."""
        return cls.prefix(size, size, unmatched=unmatched)

    @classmethod
    def prefix(
        cls, teacher_size: int, student_size: int, *, unmatched: Unmatched = "renormalize"
    ) -> Verbalizer:
        """The first min(U, V) ids are the same tokens, the rest is padding.

        With "renormalize", what slicing both heads gives::

            linear_distill(hidden, student_head[:n], teacher_hidden, teacher_head[:n])
        """
        n = min(integer("teacher_size", teacher_size, 1), integer("student_size", student_size, 1))
        ids = torch.arange(n)
        return cls.from_coo(
            ids,
            ids,
            torch.ones(n),
            teacher_size=teacher_size,
            student_size=student_size,
            unmatched=unmatched,
        )

    @classmethod
    def from_coo(
        cls,
        teacher_ids: Tensor | Sequence[int],  # (n,)
        student_ids: Tensor | Sequence[int],  # (n,)
        weights: Tensor | Sequence[float],  # (n,)
        *,
        teacher_size: int,
        student_size: int,
        unmatched: Unmatched = "bucket",
    ) -> Verbalizer:
        """The share weights[i] of teacher token teacher_ids[i] goes to student_ids[i]; what is
        named twice adds up. Classes are the student's tokens::

            M = torch.sparse_coo_tensor(stack([teacher_ids, student_ids]), weights, (U, V))
        """
        columns = sparse.from_lists(
            teacher_ids,
            student_ids,
            weights,
            integer("teacher_size", teacher_size, 1),
            integer("student_size", student_size, 1),
        )
        return cls(teacher_size, student_size, student_size, *columns, unmatched=unmatched)

    @classmethod
    def from_tokenizers(
        cls,
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        *,
        teacher_size: int | None = None,
        student_size: int | None = None,
        unmatched: Unmatched = "bucket",
        specials: Mapping[int, int] | None = None,
        cache_dir: str | Path | None = None,
    ) -> Verbalizer:
        """Each teacher token goes to the first student token of its text, many to one.

        Replaces, byte-exactly also for tokens that are no valid text by themselves::

            student_id = student_tokenizer.encode(teacher_tokenizer.decode([teacher_id]))[0]

        A student token of the very same bytes comes first, then the student's own tokenization,
        then the longest student token that the text begins with. A token none of which holds for is
        unmatched. Special tokens are paired by role (eos, bos, pad, unk), never by their spelling.
        Tokenizers that are the same give `prefix`.

        Args:
            teacher_tokenizer, student_tokenizer: see `token_bytes.token_bytes`.
            teacher_size, student_size: rows of the heads, if they are padded; or fewer than tokens,
                where the last ones are special, stand for no text and have no role.
            specials: more pairs of teacher and student ids, over the above: `{im_end: eos}`.
            cache_dir: a folder that keeps the map under a hash of its inputs; a broken file in it
                is made again.
        """
        teacher, student = read(teacher_tokenizer), read(student_tokenizer)
        sizes = _head_sizes(teacher, student, teacher_size, student_size)
        pairs = dict(specials or {})

        def build() -> Verbalizer:
            found = token_match.by_text(teacher, student, student_tokenizer, sizes, pairs)
            return _of_tokens(found, sizes, unmatched, teacher, student)

        if cache_dir is None:
            return build()
        key = (FORMAT, teacher.hash, student.hash, *sizes, unmatched, sorted(pairs.items()))
        return _cached(Path(cache_dir), key, build)

    @classmethod
    def from_lexicon(
        cls,
        pairs: Iterable[tuple[str, str]],
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        *,
        share: float = 0.5,
        base: Verbalizer | None = None,
        unmatched: Unmatched = "bucket",
    ) -> Verbalizer:
        """Moves a share of the mass of a pivot language's words to their translations' first token.

        Where t is a word's teacher token and s_1 ... s_n are its translations' student tokens::

            M[t] = (1 - share) * base[t]
            M[t, s_i] += share / n

        Only pivot words that are one token of the teacher can give: the first part of a longer
        word belongs to others too. Words are read as they stand in text, alone and after a space;
        a form after a space gives to the same form of the translation, or to its only form where
        the script has no spaces between words (see `words.paired_forms`).

        Args:
            pairs: (pivot word, target word); a word may have several translations.
            share: what is moved, in (0, 1]; several translations share it evenly.
            base: the map to start from, whose classes are student tokens; by default that of
                `from_tokenizers` (for padded heads, give one of their sizes).
            unmatched: of the default base; a base that is given has its own.

        Raises:
            ValueError: no pivot word is a single token of the teacher.
        """
        share = number("share", share, SHARES[0], 1)
        checked = lexicon.check_pairs(pairs)
        sides = lexicon.Sides(teacher_tokenizer, student_tokenizer)
        base = _base(base, sides, unmatched)
        sizes = base.teacher_size, base.student_size
        columns = lexicon.moved(base.columns, sides.moves(checked), share, *sizes)
        return base._replaced(columns, torch.arange(base.student_size, device=base.device))

    @classmethod
    def from_concepts(
        cls,
        groups: Iterable[Iterable[str]],
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        *,
        base: Verbalizer | None = None,
        clash: Literal["error", "first"] = "error",
        unmatched: Unmatched = "bucket",
    ) -> Verbalizer:
        """Words of several languages that mean the same form one class on both sides.

        The student is taught how likely the meaning is, and is free in the wording. All other
        tokens are as in `base`. A word stands for its first token, alone and after a space; the
        class takes the number of its first student token.

        Args:
            groups: the words of each concept.
            base: the map of all other tokens, whose classes are student tokens; by default that of
                `from_tokenizers` (for padded heads, give one of their sizes).
            clash: for a token that begins words of two concepts: "error", or "first" leaves it to
                the concept that is named first.

        Raises:
            ValueError: clash="error" and a token begins words of two concepts, which are named; or
                no concept has tokens on both sides.
        """
        if clash not in ("error", "first"):
            raise ValueError(f"clash must be one of error, first, got {clash!r}")
        named = {
            f"groups[{i}]": words.check_words(f"groups[{i}]", group)
            for i, group in enumerate(groups)
        }
        sides = lexicon.Sides(teacher_tokenizer, student_tokenizer)
        teacher, student = sides.claims(named, first_wins=clash == "first")
        base = _base(base, sides, unmatched)
        return base._replaced(*lexicon.merged(base.columns, teacher, student, base.student_size))

    @classmethod
    def from_label_words(
        cls,
        labels: Mapping[str, Iterable[str]],
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        *,
        teacher_size: int | None = None,
        student_size: int | None = None,
        unmatched: Unmatched = "bucket",
    ) -> Verbalizer:
        """A verbalizer in the classic sense: each label's words form a class, in the order given;
        all other tokens are unmatched. A word stands for its first token, alone and after a space.

        Raises:
            ValueError: a token begins words of two labels, or a label's words begin with no token
                on one side; they are named.
        """
        named = {
            label: words.check_words(f"labels[{label!r}]", given) for label, given in labels.items()
        }
        sides = lexicon.Sides(teacher_tokenizer, student_tokenizer)
        sizes = _head_sizes(sides.teacher, sides.student, teacher_size, student_size)
        claims = sides.claims(named, first_wins=False)
        columns, classes = lexicon.labelled(list(named), *claims, sizes[1])
        hashes = sides.teacher.hash, sides.student.hash
        return cls(*sizes, len(named), *columns, classes, unmatched, *hashes)

    def _replaced(self, columns: Columns, student_class: Tensor) -> Verbalizer:
        """The same vocabularies with another map."""
        return replace(
            self,
            indptr=columns.indptr,
            teacher_ids=columns.ids,
            weights=columns.weights,
            student_class=student_class,
        )

    def compose(self, other: Verbalizer) -> Verbalizer:
        """First this map, then `other`: teacher -> student of this one -> student of the other.

        Replaces::

            M = self.M @ other.M

        `other` may have any classes; this one's must be its student's tokens, one for each. Both
        must treat what is unmatched alike: mass that either leaves over is left over.

        Raises:
            ValueError: sizes, tokenizers or `unmatched` that don't fit, or student tokens that
                share a class in the first map.
        """
        _check_composes(self, other)
        columns = sparse.product(self.columns, other.columns, self.teacher_size, self.student_size)
        return Verbalizer(
            self.teacher_size,
            other.student_size,
            other.num_classes,
            *columns,
            student_class=other.student_class,
            unmatched=self.unmatched,
            teacher_hash=self.teacher_hash,
            student_hash=other.student_hash,
        )

    def coverage(
        self,
        frequency: Tensor | None = None,  # (U,)
        tokens: Sequence[bytes | str | None] | None = None,  # at most U
    ) -> Coverage:
        """The share of the teacher's mass that lands on a class.

        Args:
            frequency: how often the teacher says each token, in any unit; None: all alike.
            tokens: their texts (`token_bytes`), for shares by script: that of the first letter;
                "special", "bytes" (half a character) and "other" (no letters) beside.
        """
        return coverage(self.mapped, self.matched, frequency, tokens)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file under a temporary name, then renames it."""
        from safetensors.torch import save_file

        path = Path(path)
        metadata = {"format": FORMAT, "unmatched": self.unmatched}
        metadata |= {name: str(getattr(self, name)) for name in SIZES}
        metadata |= {name: getattr(self, name) for name in HASHES if getattr(self, name)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(
                {name: getattr(self, name).cpu().contiguous() for name in DTYPES},
                temporary,
                metadata,
            )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | Path, teacher_tokenizer: Any = None, student_tokenizer: Any = None
    ) -> Verbalizer:
        """Reads what `save` wrote, on the CPU.

        Tokenizers that are given must be those of the file, where it names any: `from_coo` and
        `prefix` know of none.

        Raises:
            ValueError: a file that is broken or of another kind, or a tokenizer that has changed.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} must be a saved verbalizer, got a broken file: {error}"
            ) from None
        _check_file(path, metadata, tensors)
        for name, tokenizer in (("teacher", teacher_tokenizer), ("student", student_tokenizer)):
            saved = metadata.get(f"{name}_hash")
            if tokenizer is None or saved is None or saved == (now := tokenizer_hash(tokenizer)):
                continue
            raise ValueError(
                f"{name}_tokenizer must be the one that {path} was made for (sha256 "
                f"{saved[:12]}), it has changed to {now[:12]}"
            )
        known: dict[str, Any] = {name: int(metadata[name]) for name in SIZES}
        known |= {name: metadata.get(name) for name in HASHES}
        return cls(**known, **tensors, unmatched=metadata["unmatched"])


def _of_tokens(
    columns: Columns,
    sizes: tuple[int, int],
    unmatched: Unmatched,
    teacher: Vocabulary,
    student: Vocabulary,
) -> Verbalizer:
    """Onto the student's tokens."""
    return Verbalizer(
        *sizes,
        sizes[1],
        *columns,
        unmatched=unmatched,
        teacher_hash=teacher.hash,
        student_hash=student.hash,
    )


def _base(given: Verbalizer | None, sides: lexicon.Sides, unmatched: Unmatched) -> Verbalizer:
    """The map that was given, checked, or the one of the tokens' texts."""
    teacher, student = sides.teacher, sides.student
    if given is None:
        sizes = len(teacher.bytes), len(student.bytes)
        found = token_match.by_text(teacher, student, sides.student_tokenizer, sizes, {})
        return _of_tokens(found, sizes, unmatched, teacher, student)
    if not isinstance(given, Verbalizer):
        raise TypeError(f"base must be a Verbalizer or None, got {type(given).__name__}")
    for side, vocabulary in (("teacher", teacher), ("student", student)):
        size, saved = getattr(given, f"{side}_size"), getattr(given, f"{side}_hash")
        if size < vocabulary.needed:
            raise ValueError(
                f"base must have a {side}_size of at least {vocabulary.needed} as "
                f"{side}_tokenizer has, got {size}"
            )
        if saved not in (None, vocabulary.hash):
            raise ValueError(f"base must be a map for {side}_tokenizer, it was made for another")
    if not given.one_token_each:
        raise ValueError("base must have one student token for each class, some have several")
    return given


def _own_classes(verbalizer: Verbalizer) -> Tensor:
    if verbalizer.num_classes != verbalizer.student_size:
        raise ValueError(
            f"student_class must be given where num_classes is not student_size, got "
            f"{verbalizer.num_classes} and {verbalizer.student_size}"
        )
    device = verbalizer.indptr.device if isinstance(verbalizer.indptr, Tensor) else None
    return torch.arange(verbalizer.student_size, device=device)


def _head_sizes(
    teacher: Vocabulary, student: Vocabulary, teacher_size: int | None, student_size: int | None
) -> tuple[int, int]:
    sizes = []
    for name, size, vocabulary in (
        ("teacher", teacher_size, teacher),
        ("student", student_size, student),
    ):
        least = vocabulary.needed
        known = len(vocabulary.bytes)
        sizes.append(known if size is None else integer(f"{name}_size", size, least))
    return sizes[0], sizes[1]


def _cached(folder: Path, key: tuple[Any, ...], build: Callable[[], Verbalizer]) -> Verbalizer:
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    path = folder / f"verbalizer-{name}.safetensors"
    if path.exists():
        try:
            return Verbalizer.load(path)
        except (OSError, TypeError, ValueError):  # broken: made again
            pass
    made = build()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def _check_file(path: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> None:
    if metadata.get("format") != FORMAT:
        got = metadata.get("format")
        raise ValueError(f"{path} must be a saved verbalizer of format {FORMAT}, got {got!r}")
    absent = [name for name in (*SIZES, "unmatched") if name not in metadata]
    absent += [name for name in DTYPES if name not in tensors]
    if absent or len(tensors) != len(DTYPES):
        got = ", ".join(sorted(tensors))
        raise ValueError(f"{path} must hold {', '.join(DTYPES)} and their sizes, got {got}")


def _check_composes(first: Verbalizer, other: Verbalizer) -> None:
    if not isinstance(other, Verbalizer):
        raise TypeError(f"other must be a Verbalizer, got {type(other).__name__}")
    if other.teacher_size != first.student_size:
        raise ValueError(
            f"other must have a teacher_size of {first.student_size}, the student_size of the "
            f"first, got {other.teacher_size}"
        )
    if not first.one_token_each:
        raise ValueError(
            "the first map must have one student token for each class (as from_coo, "
            "from_tokenizers and from_lexicon make them), some have several"
        )
    if other.unmatched != first.unmatched:
        raise ValueError(
            f"other must have unmatched={first.unmatched!r} as the first, got {other.unmatched!r}"
        )
    if first.student_hash and other.teacher_hash not in (None, first.student_hash):
        raise ValueError("other must start from the first's student tokenizer, got another one")
