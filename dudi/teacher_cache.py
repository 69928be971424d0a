"""A teacher from a folder: what it says of the responses that it was asked about.

An entry is of one response under one prompt, both in the teacher's tokens, and is found by the hash
of these and of the teacher: its final hidden states in bf16, beside which the folder has the head
(`CachedStates`), or its likeliest tokens (`CachedTop`). caching.py fills the folder. Everything in
it is verified when it is opened, and all that a run will ask for is looked for before its first
step.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dudi.callbacks import read_jsonl
from dudi.known import Answers, KnownStates, KnownTeacher, KnownTop, sequences
from dudi.pairing import Pairing
from dudi.shards import KEY_BYTES, DamagedError, Shards, open_named
from dudi.signals import Packed, lm_head, pack, response_hidden
from dudi_kernels import LMHead, TopKTeacher

FORMAT = "2"
CACHE_FILE, TOKENIZER, HEAD = "cache.json", "tokenizer", "head-"
LEFT_OUT = "left_out.jsonl"  # entries that there is no answer to: their keys, and why
AGAIN = "run `dudi cache-teacher` again, which sets it aside and makes what is missing"
SAMPLED_VALUES = 256  # of each weight of a live teacher, for its run's checkpoints


class Entry(NamedTuple):
    """A question to the teacher: a response under a prompt, in its tokens."""

    prompt: Sequence[int]
    response: Sequence[int]

    def key(self, teacher: str) -> bytes:
        digest = hashlib.blake2b(teacher.encode(), digest_size=KEY_BYTES)
        digest.update(len(self.prompt).to_bytes(8, "little"))
        for ids in self:
            digest.update(np.asarray(ids, dtype="<i4").tobytes())
        return digest.digest()


@dataclass(frozen=True)
class About:
    """What a folder holds: the content of cache.json."""

    kind: str  # hidden or topk
    teacher: str  # its name
    identity: str  # a hash of its architecture and weights, or of a server's name
    vocab_size: int | None  # rows of the head; of topk, tokens it is over; None: a server's
    top_k: int | None = None
    head: str = ""  # the head's file
    softcap: float | None = None
    scale: float = 1.0
    format: str = FORMAT

    @property
    def header(self) -> dict[str, str]:
        """What each of the folder's files must say of itself."""
        own = {"format": self.format, "kind": self.kind, "teacher": self.identity}
        return own if self.top_k is None else own | {"top_k": str(self.top_k)}

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def teacher_identity(model: Any, values: int | None = None) -> str:
    """A hash of a model's settings and of names, shapes, types and values of its weights: another
    checkpoint, adapter or precision has another one.

    values: how many of each weight, evenly spread, where all would take too long.
    """
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        if values is not None:
            flat = flat[:: max(1, len(flat) // values)]
        digest.update(flat.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:32]


def whose(teacher: Any) -> str | None:
    """What tells one teacher from another where a run goes on: of a live one, some of its weights.
    None without one."""
    if teacher is None or isinstance(teacher, KnownTeacher):
        return None if teacher is None else teacher.identity
    return f"live {teacher_identity(teacher, SAMPLED_VALUES)}"


def entries(dataset: Any, columns: Sequence[str], pairing: Pairing | None) -> list[Entry]:
    """What a teacher is asked about a prepared dataset, under the prompts of `columns`."""
    rows = dataset.select_columns([*columns, "completion_ids"])
    return [entry for row in rows for entry in asked_about(row, columns, pairing)]


def asked_about(
    row: Mapping[str, Any], columns: Iterable[str], pairing: Pairing | None
) -> list[Entry]:
    own = row["completion_ids"]
    response = own if pairing is None else pairing([own]).teacher_ids[0]
    return [Entry(row[column], response) for column in columns] if response else []


# ---- reading -----------------------------------------------------------------------------------


def read_about(folder: Path) -> About:
    """cache.json, verified."""
    path = folder / CACHE_FILE
    if not path.is_file():
        raise ValueError(
            f"teacher_cache {str(folder)!r} must be a folder that `dudi cache-teacher` has "
            f"written, there is no {CACHE_FILE}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digest = values.pop("digest")
        about = About(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not what `dudi cache-teacher` writes: {error!r}") from error
    if about.format != FORMAT:
        raise ValueError(f"{path} must have the format {FORMAT}, got {about.format!r}")
    if about.digest != digest:
        raise ValueError(
            f"{path} is corrupt: its content has the hash {about.digest}, not {digest}"
        )
    return about


def read_left_out(folder: Path) -> dict[bytes, str]:
    """Keys of the entries that there is no answer to, and why."""
    records = read_jsonl(folder / LEFT_OUT)
    return {bytes.fromhex(str(record["key"])): str(record["reason"]) for record in records}


class Cache:
    """The entries of a folder.

    skip_damaged: whether what is in a damaged shard counts as lost; without it, or for the rest of
    the folder, what is corrupt is a ValueError that names the file. So is what belongs elsewhere.
    """

    def __init__(self, folder: str | Path, kind: str, skip_damaged: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self.about = read_about(self.folder)
        self.what = f"the teacher in teacher_cache {str(folder)!r}"
        if self.about.kind != kind:
            raise ValueError(f"{self.what} must be of the kind {kind}, got {self.about.kind!r}")
        self.damaged: list[DamagedError] = []
        self.shards = Shards(
            self.folder, self.about.header, AGAIN, self.damaged if skip_damaged else None
        )
        for error in self.damaged:
            warnings.warn(f"what is in it is lost to this run: {error}", stacklevel=3)
        self.left_out = read_left_out(self.folder)

    @property
    def tokenizer(self) -> str:
        return str(self.folder / TOKENIZER)

    @property
    def identity(self) -> str:
        return " ".join(self.about.header.values())

    def read(self, entry: Entry, *fields: str) -> list[Tensor] | None:
        """The rows of an entry, or None where it is not there."""
        key = entry.key(self.about.identity)
        return self.shards.read(key, fields) if key in self.shards else None

    def missing(self, asked: Iterable[Entry]) -> list[Entry]:
        return [entry for entry in asked if entry.key(self.about.identity) not in self.shards]

    def why_lost(self, entry: Entry) -> str | None:
        """Why an entry that was asked for is not there; None where it was never asked for."""
        reason = self.left_out.get(entry.key(self.about.identity))
        if reason is None and self.damaged:
            names = ", ".join(error.path.name for error in self.damaged)
            reason = f"it is not in the cache, of which {names} is damaged"
        return reason

    def refuse(self, asked: int) -> ValueError:
        return ValueError(
            f"{self.what} lacks {asked} of the sequences that it is asked about: run "
            "`dudi cache-teacher` again with this recipe"
        )


def asked_of(packed: Packed) -> list[Entry]:
    return [Entry(*sequence) for sequence in sequences(packed) if sequence.response]


class CachedTop(KnownTop):
    """The likeliest tokens of each row, from a cache."""

    @property
    def identity(self) -> str:
        return self.cache.identity

    def __init__(self, folder: str | Path, skip_damaged: bool = False) -> None:
        self.cache = Cache(folder, "topk", skip_damaged)
        about = self.cache.about
        super().__init__(self.cache.tokenizer, about.vocab_size, self.cache.what)

    def top(self, packed: Packed) -> Answers:
        found = [self.cache.read(entry, "ids", "log_probs") for entry in asked_of(packed)]
        rows = [entry for entry in found if entry is not None]
        if len(rows) < len(found):
            raise self.cache.refuse(len(found) - len(rows))
        k = self.cache.about.top_k or 1
        none = [torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k)]
        ids, log_probs = (torch.cat(part)[packed.order] for part in zip(none, *rows, strict=True))
        return Answers(TopKTeacher(ids.long(), log_probs), {})


class CachedStates(KnownStates):
    """Final hidden states from a cache; those that it lacks from a live teacher.

    Raises ValueError for a live teacher that is not the one that was cached.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def identity(self) -> str:
        return self.cache.identity

    def __init__(self, folder: str | Path, live: Any = None, skip_damaged: bool = False) -> None:
        cache = Cache(folder, "hidden", skip_damaged)
        super().__init__(cache.tokenizer, cache.about.vocab_size, cache.what)
        if live is not None and teacher_identity(live) != cache.about.identity:
            raise ValueError(
                f"{cache.what} is not the live one: it was made with {cache.about.teacher!r}, of "
                "other weights or another precision"
            )
        self.cache, self.live = cache, live
        if live is None:
            self._load_head()

    def _load_head(self) -> None:
        about = self.cache.about
        file = open_named(self.cache.folder / about.head, about.header, AGAIN)
        for name in ("weight", "bias"):
            tensor = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
            value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, value)

    @property
    def head(self) -> LMHead:
        if self.live is not None:
            return lm_head(self.live)
        about = self.cache.about
        return LMHead(self.weight, self.bias, about.softcap, about.scale)

    def hidden(self, packed: Packed, padding_free: bool = False) -> Tensor:
        """(N, E) final hidden states of the rows that predict response tokens, in the head's
        dtype."""
        asked, weight = asked_of(packed), self.head.weight
        found = [self.cache.read(entry, "hidden") for entry in asked]
        there = {i: rows[0] for i, rows in enumerate(found) if rows is not None}
        absent = [i for i in range(len(asked)) if i not in there]
        states: dict[int, Tensor] = {}
        if there:  # in one copy to the device
            together = torch.cat(list(there.values())).to(weight.device, weight.dtype)
            states |= zip(
                there, together.split([len(rows) for rows in there.values()]), strict=True
            )
        if absent:
            read = self._live([asked[i] for i in absent], padding_free)
            states |= zip(absent, read, strict=True)
        none = weight.new_zeros(0, weight.shape[1])
        return torch.cat([none, *(states[i] for i in range(len(asked)))])[packed.order]

    def _live(self, asked: list[Entry], padding_free: bool) -> Sequence[Tensor]:
        if self.live is None:
            raise self.cache.refuse(len(asked))
        return states_of(self.live, asked, self.head.weight.device, padding_free)


def states_of(
    model: Any, asked: Sequence[Entry], device: torch.device, padding_free: bool = False
) -> Sequence[Tensor]:
    """Final hidden states of each response, from a forward pass."""
    prompts, responses = (
        [torch.tensor(ids, dtype=torch.long) for ids in part] for part in zip(*asked, strict=True)
    )
    packed = pack(prompts, responses, 0)  # what pads is masked
    hidden = response_hidden(model, packed.to(device), padding_free)
    return hidden.split([len(r) for r in responses])


# ---- in a run ------------------------------------------------------------------------------------


def open_cache(args: Any, load_live: Callable[[], Any]) -> KnownTeacher:
    """The teacher of a recipe with `teacher_cache`; `load_live`: for samples, which no cache has.

    Raises ValueError for a signal that the cache can't serve, and for another teacher's cache.
    """
    about = read_about(Path(args.teacher_cache).expanduser())
    named = args.teacher_model_name_or_path
    if named is not None and not _same_name(named, about.teacher):
        raise ValueError(
            f"teacher_cache {args.teacher_cache!r} was made with {about.teacher!r}, not with "
            f"teacher_model_name_or_path={named!r}"
        )
    if about.kind == "topk" and 1 not in args.taught_sides:
        return CachedTop(args.teacher_cache, args.skips_bad)
    live = None
    if 1 in args.taught_sides:
        if about.kind == "topk":
            raise ValueError(
                f"on_policy_weight must be 0 and reference not 'teacher' with likeliest tokens in "
                f"teacher_cache {args.teacher_cache!r}: they are of given responses"
            )
        live = load_live()
        if live is not None:
            LMHead.check(live)
        else:
            raise ValueError(
                "teacher_cache holds what the teacher says of given responses, not of samples: "
                f"on_policy_weight={args.on_policy_weight} or reference={args.reference!r} needs "
                "teacher_model_name_or_path as well"
            )
    return CachedStates(args.teacher_cache, live, args.skips_bad)


def _same_name(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def columns_asked(args: Any, split: str) -> list[str]:
    """Under which prompts a teacher is asked about y+; an evaluation is under the student's own."""
    if split != "train":
        return ["plain_prompt_ids"]
    plain = ["plain_prompt_ids"] if args.needs_plain_teacher else []
    return ["teacher_prompt_ids", *plain]


def answered_rows(
    teacher: Any, dataset: Any, args: Any, pairing: Pairing | None, split: str
) -> tuple[Any, list[dict[str, Any]]]:
    """The rows of a split that the cache has all answers to; of the others, what was lost.

    Raises ValueError for rows that the cache was never asked about, and for lost ones unless
    `bad_rows` is skip.
    """
    taught = split != "train" or 0 in args.taught_sides
    live = getattr(teacher, "live", None)
    if not isinstance(teacher, (CachedStates, CachedTop)) or dataset is None or not taught:
        return dataset, []
    if live is not None and split != "train":  # it is asked
        return dataset, []
    columns, lost, unknown = columns_asked(args, split), [], 0
    for row in dataset.select_columns([*columns, "completion_ids", "row"]):
        lacking = teacher.cache.missing(asked_about(row, columns, pairing))
        reasons = [teacher.cache.why_lost(entry) for entry in lacking]
        unknown += None in reasons
        if lacking and reasons[0] is not None:
            reason = f"the teacher's answer: {reasons[0]}"
            lost.append({"split": split, "row": row["row"], "reason": reason})
    if unknown or (lost and not args.skips_bad):
        raise ValueError(_lacks(args, split, unknown + len(lost), len(dataset), lost))
    if not lost:
        return dataset, lost
    warnings.warn(
        f"{len(lost)} of {len(dataset)} rows of the {split} dataset are left out; row "
        f"{lost[0]['row']} is the first: {lost[0]['reason']}",
        stacklevel=3,
    )
    if len(lost) == len(dataset):
        raise ValueError(f"no row of the {split} dataset is left: {lost[0]['reason']}")
    gone = {record["row"] for record in lost}
    numbers = dataset.with_format(None)["row"][:]
    return dataset.select([i for i, row in enumerate(numbers) if row not in gone]), lost


def _lacks(args: Any, split: str, lacking: int, rows: int, lost: list[dict[str, Any]]) -> str:
    told = f"; row {lost[0]['row']}, {lost[0]['reason']}" if lost else ""
    return (
        f"teacher_cache {args.teacher_cache!r} lacks what is asked about {lacking} of {rows} rows "
        f"of the {split} dataset: run `dudi cache-teacher` again with this recipe (prompts, "
        f"templates, limits of length and tokenizers decide what is asked{told})"
    )
