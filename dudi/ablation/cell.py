"""One cell: from the warm start, trained by its method, validated on the way, tested, written down.

Seconds are those of training alone (the teacher, sampling and the loss; no validation, no loading):
without an accelerator the process's CPU seconds, which with one thread a worker hardly depend on
what else the machine does.
The result has every test row's additive values (dudi.evaluation), which all statistics are made of.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback

from dudi.ablation.grid import START, STRINGS
from dudi.ablation.methods import SAME_TEXT
from dudi.ablation.own import Rows as OwnRows
from dudi.ablation.own import tokenizer_of
from dudi.ablation.shared import (
    QUIET,
    items_part,
    map_part,
    responses_part,
    start_of,
    teacher_at,
    train_rows,
)
from dudi.ablation.tuning import DIVERGED, SELECTED_BY
from dudi.bridge import Bridge, MapSettings, build_bridge
from dudi.callbacks import read_jsonl, write_text
from dudi.config import from_options
from dudi.demo_data import LANGUAGES
from dudi.evaluation.bootstrap import MEAN, sampled
from dudi.evaluation.command import dataset_task
from dudi.evaluation.figures import FIGURES
from dudi.evaluation.items import task_items
from dudi.evaluation.result import TaskResult
from dudi.evaluation.task import Rows, Source, Task, load_task
from dudi.evaluation.tasks import evaluate_tasks
from dudi.finite import NonFiniteLossError
from dudi.models import load_model, load_tokenizer
from dudi.run import build_trainer, console_style, environment, quiet_libraries
from dudi.trainer import DuDiTrainer

TESTED_PROMPT = 512  # tokens, where training has no limit
VALIDATED_TOKENS = 128  # of a validation row's response, at least
TESTED_TOKENS = 64  # of a test row's reference or generation, at least; longer ones are cut
SAMPLES = 3  # generations a language that are kept to be looked at


class Job(NamedTuple):
    """What a worker is given."""

    folder: Path
    name: str
    cell: dict[str, Any]  # grid.resolved
    hash: str
    one_epoch: bool = False  # Method.one_epoch


def result_path(folder: Path, name: str) -> Path:
    return folder / "cells" / f"{name}.json"


def done_result(job: Job) -> dict[str, Any] | None:
    """The cell's result, where there is one of this very configuration."""
    try:
        found = json.loads(result_path(job.folder, job.name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("hash") == job.hash else None


def run_cell(job: Job) -> None:
    """Train, test, write. Raises what the trainer raises, but of a trial that diverges, which is a
    result."""
    torch.set_num_threads(1)
    quiet_libraries()
    try:
        found = _trained_and_tested(job)
    except NonFiniteLossError as error:
        if job.cell["trial"] is None:
            raise
        found = {DIVERGED: str(error)}
    result = {"hash": job.hash, "cell": job.cell, "environment": environment(), **found}
    text = json.dumps(result, ensure_ascii=False, allow_nan=False)
    write_text(result_path(job.folder, job.name), text)


def _trained_and_tested(job: Job) -> dict[str, Any]:
    cell = job.cell
    tokenizer = load_tokenizer(tokenizer_of(cell["student"]), "the student's tokenizer")
    clock = Clock(job, tokenizer)
    if cell["method"] == START:
        model = loaded(start_of(job.folder, cell), torch.float32, "the start")
        clock.validate(model, 0)
    else:
        model = _trained(job, clock)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": clock.seconds,
        "wall_seconds": clock.wall,
        "curve": clock.curve,
        **tested(job, model, tokenizer),
    }


def loaded(name: str, dtype: Any, argument: str, device: Any = None) -> Any:
    """A model to be asked; without a device, where it runs best."""
    model = load_model(name, {"dtype": dtype}, argument).eval()
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def reading(options: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """How rows are read where a cell is validated and tested: as in training. `tokens` of a
    response, at least."""
    return {
        "max_prompt_length": options.get("max_prompt_length", TESTED_PROMPT),
        "max_completion_length": max(tokens, options.get("max_completion_length") or 0),
        "chat_template_kwargs": options.get("chat_template_kwargs"),
    }


# ---- training ------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Measures training without what interrupts it, and validates at equal intervals."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.job, self.tokenizer = job, tokenizer
        plan, steps = job.cell["evaluation"], job.cell["steps"]
        self.task = validation_task(job)
        self.batch, self.reading = plan["batch"], reading(job.cell["options"], VALIDATED_TOKENS)
        count = 1 if job.cell["trial"] is not None else plan["validations"]
        self.due = {max(1, round(steps * (i + 1) / count)) for i in range(count)}
        self.seconds = self.wall = 0.0
        self.curve: list[dict[str, float]] = []
        self._began = (0.0, 0.0)

    def _start(self) -> None:
        self._began = _now()

    def _stop(self) -> None:
        seconds, wall = _now()
        self.seconds += seconds - self._began[0]
        self.wall += wall - self._began[1]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.due:
            self._stop()
            self.validate(kwargs["model"], state.global_step)
            self._start()

    def validate(self, model: Any, step: int) -> None:
        found = evaluate_tasks(
            model,
            self.tokenizer,
            [self.task],
            resamples=1,
            batch_size=self.batch,
            **self.reading,
        )
        value = _values(found.tasks[self.task.name], [SELECTED_BY])[SELECTED_BY].get(MEAN)
        if value is None:
            raise NonFiniteLossError(f"the validation split's NLL after step {step} is not finite")
        self.curve.append({"step": step, "seconds": self.seconds, SELECTED_BY: value})


def _now() -> tuple[float, float]:
    """Seconds of work and of the clock; the same thing where an accelerator works."""
    if not torch.cuda.is_available():
        return time.process_time(), time.monotonic()
    torch.cuda.synchronize()
    return time.monotonic(), time.monotonic()


def validation_task(job: Job) -> Task:
    """Rows of the validation split, as many of each language, drawn once for all cells."""
    rows = job.cell["evaluation"]["validation_rows"]
    if (own := job.cell.get("data_of")) is not None:
        return _own_validation(own["validation"], job.cell["languages"], rows)
    languages = job.cell["languages"] or ("en", *LANGUAGES)
    path = items_part(job.folder, "validation", job.cell["languages"]).path
    chosen = Rows(limit=max(1, rows // len(languages)), seed=0)
    update = {"name": "validation", "source": Source(file=str(path)), "metrics": ["nll"]}
    return load_task(STRINGS).model_copy(update=update | {"rows": chosen})


def _own_validation(own: Mapping[str, Any], languages: Sequence[str] | None, rows: int) -> Task:
    found = OwnRows(**own)
    task = dataset_task(found.dataset_name, found.dataset_config, found.split)
    counts = Counter(item.language for item in task_items(task, languages))
    chosen = Rows(limit=max(1, rows // len(counts)), seed=0)
    return task.model_copy(update={"name": "validation", "metrics": ["nll"], "rows": chosen})


def options_of(job: Job, work: Path) -> dict[str, Any]:
    """What `dudi train` would be given."""
    cell, teacher = job.cell, teacher_at(job.folder, job.cell)
    options = cell["options"] | QUIET
    if options.get("vocabulary_verbalizer") == SAME_TEXT:
        options["vocabulary_verbalizer"] = str(map_part(job.folder, cell).path)
    return options | {
        "model_name_or_path": start_of(job.folder, cell),
        "tokenizer_name_or_path": tokenizer_of(cell["student"]),
        "teacher_model_name_or_path": teacher.path,
        "teacher_model_init_kwargs": {"dtype": teacher.dtype},
        "verbalizer_cache_dir": str(job.folder / "shared" / "maps"),
        "dataset_name": "embedded strings",
        "output_dir": str(work),
        "logging_steps": max(1, cell["steps"] // 20),
        "seed": cell["seed"],
    }


def _trained(job: Job, clock: Clock) -> Any:
    """The student after its steps; what the trainer logged goes to logs/."""
    work = job.folder / "work" / job.name
    shutil.rmtree(work, ignore_errors=True)
    script, config = from_options(options_of(job, work))
    trainer = build_trainer(script, config, Dataset.from_list(_training_rows(job)))
    _check_epoch(job, trainer)
    console_style(trainer, Console(quiet=True), job.name)
    trainer.add_callback(clock)
    work.mkdir(parents=True, exist_ok=True)
    trainer.train()
    assert clock.due <= {int(point["step"]) for point in clock.curve}
    logged = "".join(json.dumps(r) + "\n" for r in read_jsonl(work / "metrics.jsonl"))
    write_text(job.folder / "logs" / f"{job.name}.jsonl", logged)
    shutil.rmtree(work)
    return trainer.model


def _check_epoch(job: Job, trainer: DuDiTrainer) -> None:
    """A method that draws all its samples at the start would draw again in a second epoch."""
    args, rows = trainer.args, len(trainer.train_dataset)
    batch = args.train_batch_size * args.gradient_accumulation_steps
    if job.one_epoch and job.cell["steps"] * batch > rows:
        raise ValueError(
            f"steps must be at most {rows // batch} for {job.cell['method']} (one epoch), got "
            f"{job.cell['steps']}"
        )


def _training_rows(job: Job) -> list[dict[str, Any]]:
    cell = job.cell
    if cell["data"] == "given":
        return train_rows(cell)
    rows = read_jsonl(responses_part(job.folder, cell).path)
    return [{name: v for name, v in row.items() if name != "provenance"} for row in rows]


# ---- testing -------------------------------------------------------------------------------------


def tested(job: Job, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Values and rows of each domain; the reason for each that is absent."""
    cell, plan = job.cell, job.cell["evaluation"]
    if not cell["domains"]:
        return {"domains": {}, "skipped": {}}
    teacher, bridge = None, None
    if cell["kl"] and any("kl" in domain["metrics"] for domain in cell["domains"].values()):
        gc.collect()  # the trainer, with a teacher of its own
        at, device = teacher_at(job.folder, cell), next(model.parameters()).device
        dtype = "float32" if device.type == "cpu" else at.dtype
        teacher = loaded(at.path, dtype, "teacher", device)
        bridge = build_bridge(model, teacher, tokenizer, None, MapSettings())
    found = evaluate_tasks(
        model,
        tokenizer,
        [domain_task(job, name) for name in cell["domains"]],
        teacher=teacher,
        bridge=bridge or Bridge(tokenizer),
        languages=cell["languages"],
        resamples=1,
        batch_size=plan["batch"],
        generate_rows=plan["generate_rows"],
        **reading(cell["options"], TESTED_TOKENS),
    )
    domains = {name: _kept(task) for name, task in found.tasks.items()}
    return {"domains": domains, "skipped": found.skipped}


def domain_task(job: Job, name: str) -> Task:
    """A task of `dudi evaluate` under the domain's name, with its metrics and limit."""
    domain = job.cell["domains"][name]
    task = load_task(domain["task"])
    update: dict[str, Any] = {"name": name, "metrics": domain["metrics"]}
    if domain["limit"] is not None:
        update["rows"] = Rows(limit=domain["limit"], seed=0)
    if task.source.builtin == "ui_strings":
        split = domain.get("split", "test")
        path = items_part(job.folder, split, job.cell["languages"]).path
        update["source"] = Source(file=str(path))
    return task.model_copy(update=update)


def _kept(task: TaskResult) -> dict[str, Any]:
    """Rows, values by figure and language, and a few samples."""
    taken: dict[str, int] = {}
    samples = []
    for sample in task.samples:
        taken[sample["language"]] = taken.get(sample["language"], 0) + 1
        if taken[sample["language"]] <= SAMPLES:
            samples.append(sample)
    figures = [n for n, figure in FIGURES.items() if any(map(figure.counts, task.rows))]
    return {
        "data": {"items": task.data["items"], "sha256": task.data["sha256"]},
        "values": _values(task, figures),
        "rows": task.rows,
        "samples": samples,
    }


def _values(task: TaskResult, figures: list[str]) -> dict[str, dict[str, float]]:
    """By figure, then by language and in the unweighted mean over these."""
    found = {name: sampled(FIGURES[name], task.rows, seed=0, resamples=1) for name in figures}
    return {
        name: {language: v.value for language, v in own.items() if math.isfinite(v.value)}
        for name, own in found.items()
    }
