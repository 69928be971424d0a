"""`dudi respond`: the teacher writes y+ for the prompts of a dataset, to train on.

Equal prompts are answered once. All prompts, sorted by length, are cut into batches; each batch has
a seed of its own and becomes a part (parts.py). So any number of processes can share the batches,
a killed one goes on where it was, and what is written does not depend on either. Whoever finds all
parts there puts them together in the order of the data.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dudi.config import DuDiConfig, ScriptArguments
from dudi.data import load_data
from dudi.models import load_model, load_tokenizer
from dudi.parts import Asked, begin_parts, fill_parts, part_path, parts_of, read_part, write_whole
from dudi.rollout import ends_of, generate, inference_mode_of
from dudi.rows import Reader, TeacherPrompts
from dudi.run import quiet_libraries
from dudi.teaching import wants_verbalizer
from dudi.verbalize import ContextVerbalizer

PLACEHOLDER = "..."  # for a row without a completion; no template shows it


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn, and which are kept."""

    samples: int
    temperature: float  # 0 is greedy
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    keep_truncated: bool

    @classmethod
    def of(
        cls,
        config: DuDiConfig,
        samples: int = 1,
        sampling_temperature: float = 0.7,
        sampling_top_p: float = 1.0,
        sampling_top_k: int = 0,
        keep_truncated: bool = False,
    ) -> Sampling:
        """Length and seed are the recipe's."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if samples > 1 and sampling_temperature == 0:
            raise ValueError(
                f"samples must be 1 at sampling_temperature 0, got {samples}: no chance"
            )
        if not 0 <= sampling_temperature < float("inf"):
            raise ValueError(
                f"sampling_temperature must be in [0, inf), got {sampling_temperature}"
            )
        if not 0 < sampling_top_p <= 1:
            raise ValueError(f"sampling_top_p must be in (0, 1], got {sampling_top_p}")
        if sampling_top_k < 0:
            raise ValueError(f"sampling_top_k must not be negative, got {sampling_top_k}")
        if config.max_completion_length is None:
            raise ValueError("max_completion_length must be a number: responses end there at last")
        return cls(
            samples,
            sampling_temperature,
            sampling_top_p,
            sampling_top_k,
            config.max_completion_length,
            config.seed,
            keep_truncated,
        )


# ---- what is asked -------------------------------------------------------------------------------


def verbalizer_of(config: DuDiConfig, data: Any) -> ContextVerbalizer | None:
    """Of the recipe's, what can be used where there are no samples, and perhaps no responses."""
    if not wants_verbalizer(config, data.column_names):
        return None
    verbalizer = ContextVerbalizer(config.verbalizer_templates, config.verbalizer_chain)
    if verbalizer.reads_samples:
        raise ValueError("a verbalizer template shows student_completion: there is no sample here")
    if verbalizer.reads("completion"):
        lacking = [i for i, row in enumerate(data) if not as_example(row).answered]
        if lacking:
            raise ValueError(
                f"a verbalizer template shows completion, which row {lacking[0]} of the train "
                "dataset does not have"
            )
    return verbalizer


class Whole(NamedTuple):
    row: dict[str, Any]  # with prompt and completion
    answered: bool  # whether it came with a response


def as_example(row: Mapping[str, Any]) -> Whole:
    """The row with `prompt` and a completion: its own, else one to be replaced."""
    whole = dict(row)
    turns = whole.pop("messages", None) if whole.get("prompt") is None else None
    if turns is not None:
        last = turns[-1] if turns else None
        ends = isinstance(last, Mapping) and last.get("role") == "assistant"
        whole["prompt"] = turns[:-1] if ends else turns
        whole["completion"] = turns[-1:] if ends else None
    answered = bool(whole.get("completion"))
    if not answered:
        text = isinstance(whole.get("prompt"), str)
        message = {"role": "assistant", "content": PLACEHOLDER}
        whole["completion"] = PLACEHOLDER if text else [message]
    return Whole(whole, answered)


def ask(
    data: Any,
    prompts: TeacherPrompts,
    drop_cut: bool = False,
    quarantine: list[dict[str, Any]] | None = None,
) -> tuple[list[Asked], Counter]:
    """Each prompt once, and counts of what was left out; `quarantine`: where bad rows go, which are
    errors without it."""
    found: dict[str, Asked] = {}
    counts: Counter[str] = Counter(rows=len(data))
    for i, row in enumerate(data):
        try:
            whole = as_example(row).row
            ids, cut = prompts.verbalized(whole, "")
        except (TypeError, ValueError) as error:
            if quarantine is None:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"row {i} of the train dataset: {error}") from error
            quarantine.append({"row": i, "reason": str(error)})
            counts["bad rows"] += 1
            continue
        if cut and drop_cut:
            counts["overlong prompts"] += 1
            continue
        counts["cut prompts"] += cut
        same = json.dumps([ids, whole["prompt"], row.get("language")], ensure_ascii=False)
        counts["equal prompts"] += same in found
        found.setdefault(same, Asked(i, ids))
    if not found:
        told = f"; the first bad row: {quarantine[0]}" if quarantine else ""
        raise ValueError(
            f"no prompt of the train dataset is left: {counts['overlong prompts']} are overlong, "
            f"{counts['bad rows']} bad{told}"
        )
    return list(found.values()), counts


def batches_of(asked: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Prompts of like length together, the longest first: what does not fit fails at once."""
    ordered = sorted(asked, key=lambda a: (-len(a.ids), a.row))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


# ---- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """The model that answers."""

    model: Any
    tokenizer: Any
    sampling: Sampling

    def _text(self, ids: Tensor, reason: str) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if reason == "eos" else text.rstrip("\ufffd")  # cut within a character

    def __call__(self, batch: Sequence[Asked], index: int) -> list[dict[str, Any]]:
        s, pad = self.sampling, self.tokenizer.pad_token_id
        repeated = [a for a in batch for _ in range(s.samples)]
        digest = hashlib.blake2b(f"{s.seed} {index}".encode(), digest_size=7).digest()
        seed = int.from_bytes(digest, "little")
        rollout = generate(
            self.model,
            [torch.tensor(a.ids) for a in repeated],
            max_completion_length=s.max_tokens,
            eos_token_id=ends_of(self.model, self.tokenizer),
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            seed=seed,
        )
        if not rollout.finite:
            rows = sorted({a.row for a in batch})
            raise ValueError(f"the teacher's logits are not finite: rows {rows} of the dataset")
        return [
            {
                "row": a.row,
                "text": self._text(ids, reason),
                "finish_reason": reason,
                "tokens": len(ids),
                "sampler_seed": seed,
            }
            for a, ids, reason in zip(
                repeated, rollout.completions, rollout.finish_reasons, strict=True
            )
        ]


# ---- putting together ----------------------------------------------------------------------------


def kept(
    answers: Sequence[dict[str, Any]], strip: bool, sampling: Sampling, counts: Counter
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, text and line of the samples of one prompt that are worth training on."""
    seen = set()
    for sample, answer in enumerate(answers):
        text = answer["text"].strip() if strip else answer["text"]
        if answer["finish_reason"] != "eos" and not sampling.keep_truncated:
            counts["truncated responses"] += 1
        elif not text.strip():
            counts["empty responses"] += 1
        elif text in seen:
            counts["equal responses"] += 1
        else:
            seen.add(text)
            yield sample, text, answer


def merged(
    data: Any,
    answers: Mapping[int, list[dict[str, Any]]],
    sampling: Sampling,
    provenance: dict[str, Any],
    counts: Counter,
) -> Iterator[dict[str, Any]]:
    """Rows to train on, in the order of the data, with all that the data says beside."""
    for row in sorted(answers):
        whole = as_example(data[row]).row
        text_row = isinstance(whole["prompt"], str)
        for sample, text, answer in kept(answers[row], not text_row, sampling, counts):
            completion = text if text_row else [{"role": "assistant", "content": text}]
            own = {name: value for name, value in answer.items() if name != "text"}
            origin = provenance | own | {"sample": sample}
            yield whole | {"completion": completion, "provenance": origin}


def finish(
    output: Path,
    data: Any,
    batches: Sequence[list[Asked]],
    sampling: Sampling,
    settings: dict[str, Any],
    counts: Counter,
    bad: Sequence[dict[str, Any]] = (),  # rows
) -> Counter:
    """Write the dataset and its sidecar, and remove the parts."""
    parts = parts_of(output)
    answers: dict[int, list[dict[str, Any]]] = {}
    for index, batch in enumerate(batches):
        for line in read_part(part_path(parts, index), batch, sampling.samples):
            answers.setdefault(line["row"], []).append(line)
    provenance = {name: settings[name] for name in ("teacher", "templates", *asdict(sampling))}
    rows = list(merged(data, answers, sampling, provenance, counts))
    if not rows:
        told = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        raise ValueError(f"no response is left to train on ({told}); they are in {parts}")
    counts["responses"] = len(rows)
    sidecar: dict[str, Any] = {"settings": settings}
    sidecar |= {"counts": {name: n for name, n in counts.items() if n}}
    sidecar |= {"bad_rows": list(bad)} if bad else {}
    write_whole(sidecar_of(output), json.dumps(sidecar, indent=1, ensure_ascii=False))
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    shutil.rmtree(parts)
    return counts


def sidecar_of(output: Path) -> Path:
    return output.with_name(output.stem + ".provenance.json")


# ---- the command ---------------------------------------------------------------------------------


def read_shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"shard must be i/n with 1 <= i <= n, such as 2/4, got {text!r}")
    return i, n


def _teacher_tokenizer(script: ScriptArguments, config: DuDiConfig, teacher: str) -> Any:
    if config.teacher_tokenizer_name_or_path is not None:
        return load_tokenizer(
            config.teacher_tokenizer_name_or_path, "teacher_tokenizer_name_or_path"
        )
    return load_tokenizer(teacher, "teacher_model_name_or_path")


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def settings_of(
    teacher: str,
    tokenizer: Any,
    verbalizer: ContextVerbalizer | None,
    sampling: Sampling,
    asked: Sequence[Asked],
    batch_size: int,
) -> dict[str, Any]:
    """What decides what is written; JSON-safe."""
    chain = None if verbalizer is None else [verbalizer.templates, verbalizer.chain]
    return {
        "teacher": teacher,
        "templates": _hash([getattr(tokenizer, "chat_template", None), chain]),
        "prompts": _hash([(a.row, a.ids) for a in asked]),
        "batch_size": batch_size,
        **asdict(sampling),
    }


def run_responding(
    script: ScriptArguments,
    config: DuDiConfig,
    output: str | Path,
    sampling: Sampling,
    *,
    batch_size: int = 16,
    shard: str = "1/1",
    console: Console | None = None,
) -> Path:
    """Write the responses to `output` (a `.jsonl`), and how they were made beside it.

    Raises ValueError for an output that is there, for parts that were made otherwise or are
    damaged, and for prompts that can't be read.
    """
    console, path, part = console or Console(), Path(output).expanduser(), read_shard(shard)
    if path.suffix != ".jsonl" or path.exists():
        got = "one that is there" if path.exists() else repr(str(output))
        raise ValueError(f"output must be a new file that ends in .jsonl, got {got}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    name = config.teacher_model_name_or_path
    if name is None:
        raise ValueError("teacher_model_name_or_path must be given: it is to write the responses")
    quiet_libraries()
    data = load_data(
        str(script.dataset_name), name=script.dataset_config, split=script.dataset_train_split
    )
    tokenizer = _teacher_tokenizer(script, config, name)
    verbalizer = verbalizer_of(config, data)
    reader = Reader(tokenizer, config.chat_template_kwargs or {}, config.max_teacher_prompt_length)
    bad: list[dict[str, Any]] = []
    asked, counts = ask(
        data,
        TeacherPrompts(reader, verbalizer),
        config.overlong == "drop",
        bad if config.skips_bad else None,
    )
    settings = settings_of(name, tokenizer, verbalizer, sampling, asked, batch_size)
    batches = batches_of(asked, batch_size)
    begin_parts(parts_of(path), settings)
    model = load_model(name, config.teacher_model_init_kwargs, "teacher_model_name_or_path")
    write = Writer(model.to(config.device), tokenizer, sampling)
    with Progress(console=console, transient=True) as bar, inference_mode_of(model):
        task = bar.add_task("respond", total=None)
        fill_parts(
            parts_of(path),
            batches,
            write,
            part,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    absent = sum(not part_path(parts_of(path), i).exists() for i in range(len(batches)))
    if absent:
        console.print(
            f"[bold]respond[/] shard {shard} is done; {absent} of {len(batches)} batches are left "
            "to the others",
            soft_wrap=True,
        )
        return path
    try:
        finish(path, data, batches, sampling, settings, counts, bad)
    except FileNotFoundError:
        if not path.exists():  # another process was as fast
            raise
    told = ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)
    console.print(f"[bold]respond[/] {told}: {path}", soft_wrap=True)
    return path
