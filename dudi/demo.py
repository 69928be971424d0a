"""`make demo`: the whole product on the embedded data, in minutes on two cores.

A new student is warmed up by plain cross-entropy; from that same point it is trained on with
cross-entropy alone, with DuDi, with DuDi without the context verbalizer and with DuDi and a
lexicon, for equal optimizer steps. All are then evaluated on held-out keys, beside the teacher.
`train_teacher` makes the embedded teacher again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from dudi.callbacks import METRICS_FILE, read_jsonl, write_text
from dudi.checkpoints import check_output_dir, clear_run
from dudi.config import from_options
from dudi.data import prepare_dataset
from dudi.demo_data import data_path, translation_rows
from dudi.evaluate import FIGURES, Evaluation, evaluate_model, evaluation_table
from dudi.lexicon_build import DEMO_LEXICON
from dudi.report import write_report
from dudi.run import Interrupted, environment, run_training
from dudi.verbalize import ContextVerbalizer

RECIPES = {  # what each run's options are merged from; all but warm start where it ends
    "warm": ("student", "warm"),
    "sft": ("student", "sft"),
    "dudi": ("student", "dudi"),
    "no_context": ("student", "dudi", "no_context"),
    "lexicon": ("student", "dudi", "lexicon"),
}
RUNS = tuple(RECIPES)
GENERATED_ROWS = 32  # test rows a language whose generations are scored
TEACHER_BYTES = 15_000_000  # what the package may carry


def recipe(*names: str) -> dict[str, Any]:
    """Embedded recipes merged, the later ones last."""
    merged: dict[str, Any] = {}
    for name in names:
        text = data_path(f"demo/{name}.yaml").read_text(encoding="utf-8")
        merged |= yaml.safe_load(text)
    return merged


def train_one(
    name: str, folder: Path, seed: int, train: Dataset, console: Console, **extra: Any
) -> dict[str, Any]:
    """Train one of the demo's students and return its run.json."""
    settings = {
        **recipe(*RECIPES[name]),
        "tokenizer_name_or_path": str(data_path("tokenizer")),
        "dataset_name": "dudi demo data",
        "output_dir": str(folder / name),
        "seed": seed,
        **extra,
    }
    script, config = from_options(settings)
    try:
        run_training(script, config, console=console, command="dudi demo", train=train, label=name)
    except Interrupted:
        raise Interrupted("The demo was stopped; --overwrite starts it anew.") from None
    return json.loads((folder / name / "run.json").read_text(encoding="utf-8"))


def train_students(
    folder: Path, seed: int, train: Dataset, console: Console, steps: int | None
) -> dict[str, dict[str, Any]]:
    """Every run's run.json: the warm start, and what goes on from there."""
    taught = {
        "teacher_model_name_or_path": str(data_path("teacher")),
        "teacher_model_init_kwargs": {"dtype": "float32"},
    }
    own = {"lexicon": {"lexicon": str(data_path(DEMO_LEXICON))}}
    warm = str(folder / "warm" / "model")
    start: dict[str, Any] = {"model_name_or_path": warm, "model_config": None}
    start |= {} if steps is None else {"max_steps": steps}
    runs = {}
    for name, names in RECIPES.items():
        extra = {} if name == "warm" else start
        extra = extra | (taught if "dudi" in names else {}) | own.get(name, {})
        runs[name] = train_one(name, folder, seed, train, console, **extra)
    return runs


def load_for_evaluation(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def evaluate_all(
    models: dict[str, Path], tokenizer: Any, test: Dataset, console: Console
) -> dict[str, Evaluation]:
    """Each model on the held-out keys, beside the teacher."""
    prepared, _ = prepare_dataset(
        test, tokenizer, verbalizer=None, max_prompt_length=None, max_completion_length=None
    )
    teacher = load_for_evaluation(models["teacher"])
    results = {}
    for name, path in models.items():
        started = time.monotonic()
        results[name] = evaluate_model(
            teacher if name == "teacher" else load_for_evaluation(path),
            tokenizer,
            prepared,
            teacher=teacher,
            batch_size=64,
            generate_rows=GENERATED_ROWS,
            max_completion_length=64,
        )
        mean = results[name].mean
        console.print(
            f"[bold]evaluate[/] {name}: {mean['nll_per_char']:.3f} nats a character, "
            f"KL {mean['kl_to_teacher']:.3f}, chrF {mean['chrf']:.1f}"
            f"  [dim]{len(test)} rows, {time.monotonic() - started:.0f} s[/]",
            highlight=False,
            soft_wrap=True,
        )
    return results


def summarise(
    seed: int, results: dict[str, Evaluation], runs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The content of summary.json: what each model is, what it cost, how it does."""
    summary: dict[str, Any] = {"seed": seed}
    for name, result in results.items():
        figures = result.to_dict()
        summary[name] = {
            "parameters": runs[name]["parameters"],
            "optimizer_steps": runs[name]["steps"],
            "seconds": runs[name]["seconds"],
            "languages": {
                language: {key: values[key] for key in FIGURES}
                for language, values in figures["languages"].items()
            },
            "mean": {key: figures["mean"][key] for key in FIGURES},
        }
    return summary


def teacher_info() -> dict[str, Any]:
    """What the embedded teacher's training run recorded."""
    return json.loads((data_path("teacher") / "training.json").read_text(encoding="utf-8"))


def merge_metrics(folder: Path) -> None:
    """One metrics.jsonl for the whole demo, each line naming its run."""
    lines = [
        json.dumps({"run": run, **record})
        for run in RUNS
        for record in read_jsonl(folder / run / METRICS_FILE)
    ]
    write_text(folder / METRICS_FILE, "\n".join(lines) + "\n")


def run_demo(
    output_dir: str | Path = "runs/demo",
    seed: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
    steps: int | None = None,  # after the warm start; by default the recipes'
) -> Path:
    """Train and evaluate the demo's models; returns the folder with the report and summary.json."""
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    console = console or Console()
    folder = Path(output_dir)
    check_output_dir(folder, resume=False, overwrite=overwrite)
    teacher_path = data_path("teacher")
    tokenizer = AutoTokenizer.from_pretrained(data_path("tokenizer"))
    train = Dataset.from_list(translation_rows("train"))
    test = Dataset.from_list(translation_rows("test"))
    started = time.monotonic()
    info: dict[str, Any] = {
        "title": "DuDi demo",
        "command": f"dudi demo --seed {seed}" + (f" --steps {steps}" if steps else ""),
        "environment": environment(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "languages": sorted(set(train["language"])),
        "config": {name: recipe(*names) for name, names in RECIPES.items()} | {"seed": seed},
    }
    clear_run(folder, *RUNS)
    write_text(folder / "run.json", json.dumps(info, indent=1))

    runs = {"teacher": teacher_info()} | train_students(folder, seed, train, console, steps)
    models = {"teacher": teacher_path} | {run: folder / run / "model" for run in RUNS}
    results = evaluate_all(models, tokenizer, test, console)

    evaluations = {name: result.to_dict() for name, result in results.items()}
    summary = summarise(seed, results, runs)
    info |= {
        "seconds": round(time.monotonic() - started, 1),
        "parameters": runs["dudi"]["parameters"],
        "teacher_parameters": runs["teacher"]["parameters"],
        "steps": runs["dudi"]["steps"],
    }
    write_text(folder / "run.json", json.dumps(info, indent=1))
    write_text(folder / "evaluation.json", json.dumps(evaluations, ensure_ascii=False))
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    merge_metrics(folder)
    console.print(evaluation_table(results))
    console.print(f"Done in {info['seconds']:.0f} s. Open [bold]{write_report(folder)}[/]")
    return folder


# ---- the embedded teacher ----------------------------------------------------------------------


def teacher_rows(split: str) -> list[dict[str, Any]]:
    """Each item twice: under the student's prompt and under the verbalizer's."""
    verbalizer = ContextVerbalizer()
    rows = translation_rows(split)
    verbalized = [
        {**row, "prompt": [{"role": "user", "content": verbalizer.render(row, row["language"])}]}
        for row in rows
    ]
    keep = ("prompt", "completion", "language")
    return [{key: row[key] for key in keep} for row in rows + verbalized]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def train_teacher(
    output_dir: str | Path = "runs/demo-teacher",
    seed: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Train the embedded teacher as `dudi train` does and put it, in bf16, into <run>/teacher.

    With a checkout, `make demo-teacher` also copies it into the package.
    """
    console = console or Console()
    folder = Path(output_dir)
    check_output_dir(folder, resume=False, overwrite=overwrite)
    clear_run(folder, "teacher")
    train_file = folder.with_name(folder.name + "-data") / "train.jsonl"
    write_jsonl(train_file, teacher_rows("train"))
    validation_file = train_file.with_name("validation.jsonl")
    write_jsonl(validation_file, translation_rows("validation"))
    settings = {
        **recipe("teacher"),
        "tokenizer_name_or_path": str(data_path("tokenizer")),
        "dataset_name": str(train_file),
        "dataset_test_name": str(validation_file),
        "output_dir": str(folder),
        "seed": seed,
    }
    script, config = from_options(settings)
    run_training(script, config, console=console, command="make demo-teacher", label="teacher")
    return package_teacher(folder, console)


def package_teacher(folder: Path, console: Console) -> Path:
    """bf16 weights, tokenizer, training record and model card in one folder of at most 15 MB."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    target = folder / "teacher"
    temporary = folder / "teacher.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model.save_pretrained(temporary)
    tokenizer = AutoTokenizer.from_pretrained(data_path("tokenizer"))
    tokenizer.save_pretrained(temporary)
    size = (temporary / "model.safetensors").stat().st_size
    if size > TEACHER_BYTES:
        raise ValueError(f"the teacher must take at most {TEACHER_BYTES:,} bytes, got {size:,}")
    test = Dataset.from_list(translation_rows("test"))
    result = evaluate_all({"teacher": temporary}, tokenizer, test, console)["teacher"]
    record = {key: run[key] for key in ("parameters", "steps", "seconds", "environment", "config")}
    del record["config"]["output_dir"]
    write_text(temporary / "training.json", json.dumps(record, indent=1))
    write_text(temporary / "README.md", model_card(record, result))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    console.print(evaluation_table({"teacher": result}))
    return target


def model_card(record: dict[str, Any], result: Evaluation) -> str:
    """Data, steps, time and scores of the embedded teacher."""
    rows = "\n".join(
        f"| {language} | {v['nll_per_char']:.3f} | {v['nll_per_token']:.3f} | {v['chrf']:.1f} |"
        for language, v in [*result.languages.items(), ("mean", result.mean)]
    )
    environment_ = record["environment"]
    settings = "\n".join(f"- `{k}`: {v}" for k, v in sorted(recipe("teacher").items()))
    return f"""---
license: apache-2.0
language: [en, id, ms, vi, th, fil, my, km, lo, ta]
library_name: transformers
---
# The DuDi demo's teacher

A Llama-style causal LM of {record["parameters"]:,} parameters (bfloat16) that translates
user-interface strings between English and nine languages. It exists to teach in `dudi demo`; it is
of no use beyond.

- **Data**: the train split (by key) of the embedded UI strings, Android framework, Apache-2.0, The
  Android Open Source Project; every item once under the plain instruction and once under the
  context verbalizer's prompt, which shows the text in a third language too.
- **Training**: from scratch by `make demo-teacher` (`dudi train`, fused cross-entropy alone):
  {record["steps"]:,} steps in {record["seconds"]:.0f} s on {environment_["cpu"]}, torch
  {environment_["torch"]}, transformers {environment_["transformers"]}.

Held-out test keys, under the plain instruction (nats; chrF of greedy translations of the first
{GENERATED_ROWS} rows a language; `language` is the target):

| language | NLL per character | NLL per token | chrF |
|---|---|---|---|
{rows}

Settings:
{settings}
"""
