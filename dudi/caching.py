"""`dudi cache-teacher`: ask a recipe's teacher once, before training.

Makes the trainer of the recipe, so that prompts, tokenizers and limits are those of the run, and
writes what its teacher says of y+: of the training data under the context verbalizer's prompt (and
under the plain one, where the recipe compares them), of the test data under the plain prompt. A
source is what is asked: hidden states or likeliest tokens of a model, or a server.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dudi.callbacks import write_text
from dudi.config import DuDiConfig, ScriptArguments
from dudi.rollout import inference_mode_of
from dudi.run import build_trainer, quiet_libraries
from dudi.served import ServedTeacher
from dudi.shards import DamagedError, Shards, ShardWriter, open_named, save_named, set_aside
from dudi.signals import lm_head, vocab_size
from dudi.teacher_cache import (
    AGAIN,
    CACHE_FILE,
    HEAD,
    LEFT_OUT,
    TOKENIZER,
    About,
    Entry,
    columns_asked,
    entries,
    read_about,
    read_left_out,
    states_of,
    teacher_identity,
)
from dudi.trainer import DuDiTrainer
from dudi_kernels import likeliest_tokens

Rows = dict[str, Tensor]  # fields of one entry, with a row for each token of the response
Tell = Callable[[int, int], None]  # entries done, entries to do
KINDS = ("hidden", "topk")


class Source(Protocol):
    """Who is asked."""

    def about(self) -> About:
        """What a folder of its answers says of itself."""

    def begin(self, folder: Path) -> About:
        """Write what goes beside the answers."""

    def answers(self, asked: Sequence[Entry]) -> Iterator[Rows | str]:
        """What is stored for each, or why there is nothing to store."""


def _named(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or "a model in memory"


@dataclass(frozen=True)
class HiddenStates:
    """Final hidden states of a model, in bf16; its head goes beside them."""

    model: Any

    def about(self) -> About:
        head = lm_head(self.model)
        if head.lora is not None:
            raise ValueError(
                "a teacher whose head is adapted by a LoRA can't be cached: merge it first"
            )
        return About(
            kind="hidden",
            teacher=_named(self.model),
            identity=teacher_identity(self.model),
            vocab_size=head.vocab_size,
            softcap=head.softcap,
            scale=head.scale,
        )

    def begin(self, folder: Path) -> About:
        about, head = self.about(), lm_head(self.model)
        tensors = {"weight": head.weight.detach()}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach()
        return replace(about, head=save_named(folder, HEAD, tensors, about.header).name)

    def answers(self, asked: Sequence[Entry]) -> Iterator[Rows]:
        for states in states_of(self.model, asked, lm_head(self.model).weight.device):
            _require_finite(states, self.model)
            yield {"hidden": states.to(torch.bfloat16).cpu()}


@dataclass(frozen=True)
class LikeliestTokens:
    """The k likeliest of a model's tokens among those that the student has too."""

    model: Any
    top_k: int
    tokens: int  # rows of the head that count

    def about(self) -> About:
        if self.top_k > self.tokens:
            raise ValueError(f"cache_top_k must be at most {self.tokens} tokens, got {self.top_k}")
        identity = teacher_identity(self.model)
        return About("topk", _named(self.model), identity, self.tokens, self.top_k)

    def begin(self, folder: Path) -> About:
        return self.about()

    def answers(self, asked: Sequence[Entry]) -> Iterator[Rows]:
        head = lm_head(self.model).part(0, self.tokens)
        for states in states_of(self.model, asked, head.weight.device):
            _require_finite(states, self.model)
            top = likeliest_tokens(states, head, self.top_k)
            yield {"ids": top.ids.int().cpu(), "log_probs": top.log_probs.cpu()}


def _require_finite(states: Tensor, model: Any) -> None:
    if not bool(torch.isfinite(states).all()):
        raise ValueError(f"the hidden states of {_named(model)!r} are not finite")


# ---- the folder ----------------------------------------------------------------------------------


def begin(folder: Path, source: Source, tokenizer: Any) -> About:
    """cache.json, tokenizer and head of a new folder; of one that is there, what it must be."""
    if not (folder / CACHE_FILE).exists():
        _check_empty(folder)
        source.about()  # what can't be cached is refused before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        about = source.begin(folder)
        tokenizer.save_pretrained(folder / TOKENIZER)
        _write_about(folder, about)
        return about
    there, own = read_about(folder), source.about()
    if there.header != own.header:
        changed = [n for n in {**there.header, **own.header} if _differ(there, own, n)]
        raise ValueError(
            f"output_dir {str(folder)!r} holds a cache of {there.teacher!r} with another "
            f"{' and '.join(changed)}: choose another folder"
        )
    return there


def _write_about(folder: Path, about: About) -> None:
    content = asdict(about) | {"digest": about.digest}
    write_text(folder / CACHE_FILE, json.dumps(content, indent=1))


def _differ(one: About, other: About, name: str) -> bool:
    return one.header.get(name) != other.header.get(name)


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
    source: Source,
    tokenizer: Any,
    asked: Iterable[Entry],
    *,
    batch_size: int = 16,
    shard_bytes: int = 2**28,
    tell: Tell | None = None,
) -> tuple[int, int]:
    """Fill the folder with the answers to `asked`; what is there is kept, what is damaged is set
    aside and made again.

    Returns how many entries were made and how many were there. A shard is written whenever
    `shard_bytes` are full, so that much is lost when the process is killed. What the source has no
    answer to is listed in left_out.jsonl.
    """
    about = _whole(folder, begin(folder, source, tokenizer), source)
    damaged: list[DamagedError] = []
    done = Shards(folder, about.header, AGAIN, damaged)
    for error in damaged:
        _set_aside(error)
    wanted = {entry.key(about.identity): entry for entry in asked}
    left = [(key, entry) for key, entry in wanted.items() if key not in done]
    left.sort(key=lambda item: len(item[1].prompt) + len(item[1].response))
    writer = ShardWriter(folder, about.header, shard_bytes)
    refused: dict[bytes, str] = {}
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        for (key, _), rows in zip(
            batch, source.answers([entry for _, entry in batch]), strict=True
        ):
            if isinstance(rows, str):
                refused[key] = rows
            else:
                writer.add(key, rows)
        if tell is not None:
            tell(start + len(batch), len(left))
    writer.flush()
    _write_left_out(folder, wanted, refused)
    return len(left) - len(refused), len(wanted) - len(left)


def _whole(folder: Path, about: About, source: Source) -> About:
    """With the head made again where it is damaged."""
    if about.head:
        try:
            open_named(folder / about.head, about.header, AGAIN)
        except DamagedError as error:
            _set_aside(error)
            about = source.begin(folder)
            _write_about(folder, about)
    return about


def _set_aside(error: DamagedError) -> None:
    aside = set_aside(error.path)
    warnings.warn(f"{error.path} is damaged: kept as {aside.name}, made again", stacklevel=4)


def _write_left_out(folder: Path, wanted: Collection[bytes], refused: Mapping[bytes, str]) -> None:
    """Beside those of other recipes, which were not asked again."""
    kept = {k: reason for k, reason in read_left_out(folder).items() if k not in wanted}
    lines = [{"key": k.hex(), "reason": reason} for k, reason in {**kept, **refused}.items()]
    if lines or (folder / LEFT_OUT).exists():
        write_text(folder / LEFT_OUT, "".join(json.dumps(line) + "\n" for line in lines))
    if refused:
        warnings.warn(
            f"{len(refused)} of {len(wanted)} entries have no usable answer and are left out "
            f"({folder / LEFT_OUT}); the first: {next(iter(refused.values()))}",
            stacklevel=4,
        )


# ---- the command ---------------------------------------------------------------------------------


def asked_by(trainer: DuDiTrainer) -> list[Entry]:
    """Every question about y+ that a run of this trainer will have."""
    found = []
    for split, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if dataset is not None:
            found += entries(dataset, columns_asked(trainer.args, split), trainer.bridge.pairing)
    return found


def source_of(trainer: DuDiTrainer, kind: str, top_k: int) -> Source:
    """The trainer's teacher, asked for what the cache is to hold."""
    teacher = trainer.accelerator.unwrap_model(trainer.teacher)
    if isinstance(teacher, ServedTeacher):
        if kind != "topk":
            raise ValueError(
                f"cache must be topk with teacher_url, which gives no hidden states, got {kind!r}"
            )
        return teacher
    if kind == "hidden":
        return HiddenStates(teacher)
    if trainer.bridge.pairing is not None or trainer.args.lexicon is not None:
        raise ValueError(
            "cache must be hidden where the teacher has another tokenizer, or with a lexicon: the "
            "likeliest tokens are compared as they are"
        )
    tokens = min(vocab_size(teacher), vocab_size(trainer.accelerator.unwrap_model(trainer.model)))
    return LikeliestTokens(teacher, top_k, tokens)


def run_caching(
    script: ScriptArguments,
    config: DuDiConfig,
    *,
    cache: str = "hidden",
    cache_top_k: int = 64,
    batch_size: int = 16,
    shard_mb: int = 256,
    console: Console | None = None,
) -> Path:
    """`dudi cache-teacher`: returns the folder, config.output_dir."""
    console = console or Console()
    numbers = {"cache_top_k": cache_top_k, "batch_size": batch_size, "shard_mb": shard_mb}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if cache not in KINDS:
        raise ValueError(f"cache must be one of {', '.join(KINDS)}, got {cache!r}")
    if config.off_policy_weight == 0:
        raise ValueError(
            "off_policy_weight must be positive: nothing else asks a teacher about the given "
            "responses, which are what a cache holds"
        )
    if config.world_size > 1:
        raise ValueError(
            f"a cache must be made in one process, got {config.world_size}: leave torchrun out"
        )
    quiet_libraries()
    config.teacher_cache = None
    if config.teacher_url is not None:
        config.served_top_k = cache_top_k
    trainer = build_trainer(script, config)
    quiet_libraries()
    if trainer.verbalizer is not None and trainer.verbalizer.reads_samples:
        raise ValueError(
            "a verbalizer template shows student_completion: what the teacher reads is made in "
            "each step of a run, and can't be cached before"
        )
    folder = Path(str(config.output_dir)).expanduser()
    with Progress(console=console, transient=True) as bar, inference_mode_of(trainer.teacher):
        task = bar.add_task("cache", total=None)
        made, kept = write_cache(
            folder,
            source_of(trainer, cache, cache_top_k),
            trainer.bridge.tokenizer,
            asked_by(trainer),
            batch_size=batch_size,
            shard_bytes=shard_mb * 2**20,
            tell=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(
        f"[bold]cache[/] {made:,} entries written, {kept:,} were there: teacher_cache: {folder}",
        soft_wrap=True,
    )
    return folder
