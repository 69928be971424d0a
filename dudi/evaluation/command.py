"""`dudi evaluate` and `dudi compare`: from names and files to tables, pages and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as ProgressBar

from dudi.bridge import Bridge, MapSettings, build_bridge
from dudi.callbacks import write_text
from dudi.evaluation.compare import Comparison, compare
from dudi.evaluation.page import write_page
from dudi.evaluation.plot import check_plot, write_plot
from dudi.evaluation.result import Result, load_result
from dudi.evaluation.tables import show_comparison, show_result
from dudi.evaluation.task import Source, Task, load_tasks
from dudi.evaluation.tasks import evaluate_tasks
from dudi.models import load_model, load_tokenizer


def run_evaluation(
    model_name_or_path: str,
    *,
    tasks: Sequence[str | Path | Task] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    languages: Sequence[str] | None = None,
    name: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    teacher_model_name_or_path: str | None = None,
    teacher_tokenizer_name_or_path: str | None = None,
    vocabulary_verbalizer: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    tokenizer_name_or_path: str | None = None,
    batch_size: int = 16,
    max_prompt_length: int | None = 512,
    max_completion_length: int = 256,
    generate_rows: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
    padding_free: bool = False,
    data_dir: str | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Result:
    """`dudi evaluate`: load, evaluate, print tables by language.

    `dataset_name` is a task by itself: rows as `dudi train` reads them. `output` is a JSON file,
    written whole or not at all, that `dudi compare` reads.
    """
    console = console or Console()
    if output is not None and Path(output).is_dir():
        raise ValueError(f"output must be a file, got the folder {str(output)!r}")
    if not tasks and dataset_name is None:
        raise ValueError("tasks or dataset_name must be given")
    wanted: list[Any] = list(tasks or ())
    if dataset_name is not None:
        wanted.append(dataset_task(dataset_name, dataset_config, split))
    loaded = load_tasks(wanted)
    tokenizer = (
        load_tokenizer(tokenizer_name_or_path, "tokenizer_name_or_path")
        if tokenizer_name_or_path
        else load_tokenizer(model_name_or_path, "model_name_or_path")
    )
    model = _load(model_name_or_path, "model_name_or_path", model_init_kwargs)
    teacher, bridge = None, Bridge(tokenizer)
    if teacher_model_name_or_path:
        teacher = _load(teacher_model_name_or_path, "teacher_model_name_or_path", None)
        settings = MapSettings(vocabulary_verbalizer)
        bridge = build_bridge(model, teacher, tokenizer, teacher_tokenizer_name_or_path, settings)
    with ProgressBar(console=console, transient=True) as bar:
        line = bar.add_task("evaluate", total=None)
        result = evaluate_tasks(
            model,
            tokenizer,
            loaded,
            name=name or _name_of(model_name_or_path),
            teacher=teacher,
            bridge=bridge,
            languages=languages,
            seed=seed,
            resamples=resamples,
            batch_size=batch_size,
            generate_rows=generate_rows,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            padding_free=padding_free,
            chat_template_kwargs=chat_template_kwargs,
            data_dir=data_dir,
            progress=lambda task, done, total: bar.update(
                line, description=task, completed=done, total=total
            ),
        )
    result.settings |= {
        "model_name_or_path": model_name_or_path,
        "teacher_model_name_or_path": teacher_model_name_or_path,
    }
    show_result(result, console)
    if output is not None:
        result.save(output)
    return result


def dataset_task(name: str, config: str | None = None, split: str | None = None) -> Task:
    """A dataset of prompts and completions, as training reads it, as a task."""
    path = Path(name).expanduser()
    there = path.exists() or path.suffix or name.count("/") > 1
    source = Source(file=name, split=split) if there else Source(dataset=name, split=split)
    source = source.model_copy(update={"config": config})
    word = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.name).strip("._-")
    return Task(name=word or "dataset", source=source, examples=True)


def _name_of(model: str) -> str:
    """The folder's name; of runs/first/model, the run's."""
    path = Path(model).expanduser()
    return path.parent.name if path.name == "model" and path.parent.name else path.name or model


def _load(name: str, argument: str, init_kwargs: dict[str, Any] | None) -> Any:
    """A causal LM where it runs best: as saved on a GPU, in fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    kwargs = {"dtype": "auto" if cuda else torch.float32} | (init_kwargs or {})
    model = load_model(name, kwargs, argument)
    if "device_map" in kwargs or getattr(model, "is_quantized", False):
        return model  # placed as it was loaded
    return model.to("cuda" if cuda else "cpu")


def run_comparison(
    runs: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    baseline: str | None = None,
    page: str | None = None,
    plot: str | None = None,
    json: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """`dudi compare`: read results, print tables, write what is asked for."""
    console = console or Console()
    for argument, path in (("page", page), ("json", json)):
        if path is not None and Path(path).is_dir():
            raise ValueError(f"{argument} must be a file, got the folder {path!r}")
    if plot is not None:
        check_plot(plot)
    if names is not None and len(names) != len(runs):
        raise ValueError(f"names must be {len(runs)}, one for each run, got {len(names)}")
    results = [load_result(run) for run in runs]
    for result, name in zip(results, names or (), strict=False):
        result.name = name
    comparison = compare(results, baseline)
    show_comparison(comparison, console)
    if json is not None:
        _write_json(comparison, Path(json))
    if page is not None:
        console.print(str(write_page(comparison, page)), soft_wrap=True)
    if plot is not None:
        console.print(str(write_plot(comparison, plot)), soft_wrap=True)
    return comparison


def _write_json(comparison: Comparison, path: Path) -> None:
    write_text(path, json.dumps(comparison.to_dict(), ensure_ascii=False, allow_nan=False))
