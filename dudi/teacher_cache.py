"""A teacher from a folder: final hidden states in bf16 and the head, of the sequences it was asked.

`write_cache` (behind `dudi cache-teacher`) fills the folder, entry by entry: what the teacher says
of one response under one prompt, both in its own tokens, by the hash of these and of the teacher.
`CachedStates` reads it in the teacher's place. Everything in the folder is verified when it is
opened, and everything that a run will ask for is looked for before its first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dudi.callbacks import write_text
from dudi.known import KnownStates, KnownTeacher, sequences
from dudi.pairing import Pairing
from dudi.shards import KEY_BYTES, Shards, ShardWriter, open_named, save_named
from dudi.signals import Packed, lm_head, pack, response_hidden
from dudi_kernels import LMHead

FORMAT = "1"
CACHE_FILE, TOKENIZER, HEAD = "cache.json", "tokenizer", "head-"
AGAIN = "remove it and run `dudi cache-teacher` again, which makes what is missing"
SAMPLED_VALUES = 256  # of each weight, which tell one teacher from another
Tell = Callable[[int, int], None]  # entries done, entries to do


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

    kind: str  # hidden
    teacher: str  # its name
    identity: str  # a hash of its architecture and of some of its weights
    vocab_size: int
    width: int
    head: str  # the head's file
    softcap: float | None
    scale: float
    format: str = FORMAT

    @property
    def header(self) -> dict[str, str]:
        """What each of the folder's files must say of itself."""
        return {"format": self.format, "kind": self.kind, "teacher": self.identity}

    @property
    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def teacher_identity(model: Any) -> str:
    """A hash of a model's settings, of names, shapes and types of its weights, and of some values
    of each: another checkpoint, adapter or precision has another one."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    config.pop("transformers_version", None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED_VALUES)].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:32]


def entries(dataset: Any, columns: Iterable[str], pairing: Pairing | None) -> list[Entry]:
    """What a teacher is asked about a prepared dataset, under the prompts of `columns`."""
    found = []
    for row in dataset.select_columns([*columns, "completion_ids"]):
        own = row["completion_ids"]
        response = own if pairing is None else pairing([own]).teacher_ids[0]
        if response:
            found += [Entry(row[column], response) for column in columns]
    return found


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


class CachedStates(KnownStates):
    """Final hidden states from the cache in `folder`; those that it lacks from a live teacher.

    Raises ValueError, naming the file, for what is corrupt or belongs elsewhere, and for a live
    teacher that is not the one that was cached.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, folder: str | Path, live: Any = None) -> None:
        path = Path(folder).expanduser()
        about = read_about(path)
        what = f"the teacher in teacher_cache {str(folder)!r}"
        super().__init__(str(path / TOKENIZER), about.vocab_size, what)
        if live is not None and teacher_identity(live) != about.identity:
            raise ValueError(
                f"{what} is not the live one: it was made with {about.teacher!r}, of other weights "
                "or another precision"
            )
        self.about, self.live = about, live
        self.shards = Shards(path, about.header, AGAIN)
        if live is None:
            self._load_head(path)

    def _load_head(self, folder: Path) -> None:
        file = open_named(folder / self.about.head, self.about.header, AGAIN)
        for name in ("weight", "bias"):
            tensor = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
            value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, value)

    @property
    def head(self) -> LMHead:
        if self.live is not None:
            return lm_head(self.live)
        return LMHead(self.weight, self.bias, self.about.softcap, self.about.scale)

    def hidden(self, packed: Packed, padding_free: bool = False) -> Tensor:
        """(N, E) final hidden states of the rows that predict response tokens, in the head's
        dtype."""
        asked = [Entry(*sequence) for sequence in sequences(packed) if sequence.response]
        keys = [entry.key(self.about.identity) for entry in asked]
        absent = [i for i, key in enumerate(keys) if key not in self.shards]
        weight = self.head.weight
        states = {
            i: self.shards.read(key, ["hidden"])[0].to(weight.device, weight.dtype)
            for i, key in enumerate(keys)
            if key in self.shards
        }
        if absent:
            found = self._live([asked[i] for i in absent], padding_free)
            states |= zip(absent, found, strict=True)
        none = weight.new_zeros(0, weight.shape[1])
        return torch.cat([none, *(states[i] for i in range(len(asked)))])[packed.order]

    def _live(self, asked: list[Entry], padding_free: bool) -> Sequence[Tensor]:
        if self.live is None:
            raise ValueError(
                f"{self.what} lacks {len(asked)} of the sequences that it is asked about: run "
                "`dudi cache-teacher` again with this recipe"
            )
        return states_of(self.live, asked, self.head.weight.device, padding_free)

    def missing(self, asked: Iterable[Entry]) -> list[Entry]:
        return [entry for entry in asked if entry.key(self.about.identity) not in self.shards]


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
    live = None
    if 1 in args.taught_sides:
        live = load_live()
        if live is not None:
            LMHead.check(live)
        else:
            raise ValueError(
                "teacher_cache holds what the teacher says of given responses, not of samples: "
                f"on_policy_weight={args.on_policy_weight} or reference={args.reference!r} needs "
                "teacher_model_name_or_path as well"
            )
    return CachedStates(args.teacher_cache, live)


def _same_name(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def columns_asked(args: Any, split: str) -> list[str]:
    """Under which prompts a teacher is asked about y+; an evaluation is under the student's own."""
    if split != "train":
        return ["plain_prompt_ids"]
    plain = ["plain_prompt_ids"] if args.needs_plain_teacher else []
    return ["teacher_prompt_ids", *plain]


def check_complete(teacher: Any, dataset: Any, args: Any, pairing: Any, split: str) -> None:
    """Raise unless the cache has all that the run will ask about a split."""
    taught = split != "train" or 0 in args.taught_sides
    if not isinstance(teacher, CachedStates) or dataset is None or not taught:
        return
    asked = entries(dataset, columns_asked(args, split), pairing)
    lacking = teacher.missing(asked)
    if lacking and not (teacher.live is not None and split != "train"):
        raise ValueError(
            f"teacher_cache {args.teacher_cache!r} lacks {len(lacking)} of {len(asked)} entries "
            f"for the {split} dataset: run `dudi cache-teacher` again with this recipe (prompts, "
            "templates, limits of length and tokenizers decide what is asked)"
        )


# ---- writing -------------------------------------------------------------------------------------


def describe_teacher(model: Any, folder: Path) -> About:
    """What the cache will say of itself; the head is written on the way."""
    head = lm_head(model)
    if head.lora is not None:
        raise ValueError(
            "a teacher whose head is adapted by a LoRA can't be cached: merge it first"
        )
    identity = teacher_identity(model)
    header = {"format": FORMAT, "kind": "hidden", "teacher": identity}
    tensors = {"weight": head.weight.detach()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()
    path = save_named(folder, HEAD, tensors, header)
    return About(
        kind="hidden",
        teacher=getattr(model.config, "_name_or_path", "") or "a model in memory",
        identity=identity,
        vocab_size=head.vocab_size,
        width=head.width,
        head=path.name,
        softcap=head.softcap,
        scale=head.scale,
    )


def begin(folder: Path, model: Any, tokenizer: Any) -> About:
    """cache.json, head and tokenizer of a new folder; of one that is there, what it must be."""
    if not (folder / CACHE_FILE).exists():
        _check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = describe_teacher(model, folder)
        tokenizer.save_pretrained(folder / TOKENIZER)
        content = asdict(about) | {"digest": about.digest}
        write_text(folder / CACHE_FILE, json.dumps(content, indent=1))
        return about
    about = read_about(folder)
    if about.identity != teacher_identity(model):
        raise ValueError(
            f"output_dir {str(folder)!r} holds a cache of {about.teacher!r}, of other weights or "
            "another precision: choose another folder"
        )
    return about


def _check_empty(folder: Path) -> None:
    """A head or a tokenizer may be there, of a run that was killed at its start."""
    ours = {TOKENIZER, CACHE_FILE + ".tmp"}
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in ours and not path.name.startswith(HEAD):
                raise ValueError(
                    f"output_dir {str(folder)!r} must be empty or hold a teacher's cache, it holds "
                    f"{path.name}"
                )
    elif folder.exists():
        raise ValueError(f"output_dir {str(folder)!r} is a file")


@torch.no_grad()
def write_cache(
    folder: Path,
    model: Any,
    tokenizer: Any,
    asked: Iterable[Entry],
    *,
    batch_size: int = 16,
    shard_bytes: int = 2**28,
    tell: Tell | None = None,
) -> tuple[int, int]:
    """Fill the folder with what the model says of `asked`; what is there is kept.

    Returns how many entries were made and how many were there. A shard is written whenever
    `shard_bytes` are full, so that much is lost when the process is killed.
    """
    about = begin(folder, model, tokenizer)
    done = Shards(folder, about.header, AGAIN)
    open_named(folder / about.head, about.header, AGAIN)
    wanted = {entry.key(about.identity): entry for entry in asked}
    left = [(key, entry) for key, entry in wanted.items() if key not in done]
    left.sort(key=lambda item: len(item[1].prompt) + len(item[1].response))
    writer = ShardWriter(folder, about.header, shard_bytes)
    device = lm_head(model).weight.device
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        states = states_of(model, [entry for _, entry in batch], device)
        for (key, _), rows in zip(batch, states, strict=True):
            _require_finite(rows, about.teacher)
            writer.add(key, {"hidden": rows.to(torch.bfloat16).cpu()})
        if tell is not None:
            tell(start + len(batch), len(left))
    writer.flush()
    return len(left), len(wanted) - len(left)


def _require_finite(rows: Tensor, teacher: str) -> None:
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"the hidden states of {teacher!r} are not finite: nothing to learn from")
