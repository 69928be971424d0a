"""`dudi seahelm prepare`: a checkpoint as SEA-HELM wants it, with the suite and the command line.

    OUT/NAME/              the export (dudi/export.py); SEA-HELM names its results after the folder
    OUT/task_config.yaml   the suite of the chosen languages, in the format of SEA-HELM's own
    OUT/run.sh             the runs without DuDi: `sh run.sh CHECKOUT [RESULTS]`
    OUT/seahelm.json       what `dudi seahelm run` needs; written last

SEA-HELM asks instruct models through their chat template, and takes sampling from
generation_config.json: so the one must be there, and the other is not touched.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.console import Console

from dudi.callbacks import checked_object
from dudi.export import (
    Source,
    check_apart,
    check_dtype,
    check_target,
    find_source,
    load_own_tokenizer,
    staging_of,
    write_export,
)
from dudi.saving import disk_errors, flaw, put_in_place, seal
from dudi.seahelm.checkout import ENTRY
from dudi.seahelm.facts import facts, suite

SETTINGS_FILE = "seahelm.json"
SUITE_FILE = "task_config.yaml"
SUITE_NAME = "dudi"
RESULTS = "results"  # where run.sh and `dudi seahelm run` have them by default
# src/serving/__init__.py of SEA-HELM: what serves a model from its folder
MODEL_TYPES = ("vllm", "online_vllm", "online_sglang")
MODEL_ARGS = "enable_prefix_caching=True,tensor_parallel_size=auto"
# src/serving/offline/vllm_serving.py: switches of chat templates that model_args may have
TEMPLATE_SWITCHES = ("enable_thinking", "thinking", "thinking_mode", "reasoning_effort")


@dataclass(frozen=True)
class Prepared:
    """What seahelm.json holds."""

    model: str  # the export's folder in OUT
    suite: dict[str, list[str]]
    model_type: str
    model_args: str
    is_base_model: bool
    seahelm: str  # the version that it was prepared for

    def command(self, model: str, output_dir: str, run: str, seed: str) -> list[str]:
        """The words of one run, from the entry script on."""
        return [
            ENTRY,
            "--tasks", SUITE_NAME,
            "--output_dir", output_dir,
            "--model_type", self.model_type,
            "--model_name", model,
            *(["--model_args", self.model_args] if self.model_args else []),
            "--run", run,
            "--seed", seed,
            *(["--is_base_model"] if self.is_base_model else []),
        ]  # fmt: skip


# ---- the suite -----------------------------------------------------------------------------------


def left_out(*, no_judge_tasks: bool, no_metricx: bool, base_model: bool) -> set[str]:
    """Tasks that are not asked for, or can't be asked."""
    known, names = facts(), set()
    if no_judge_tasks:
        names |= set(known["llm_judged"])
    if no_metricx:
        names |= set(known["metricx_judged"])
    if base_model:
        names |= set(known["base_models_skip"])
    return names


def suite_text(tasks: dict[str, list[str]]) -> str:
    """The suite as a task_config.yaml of SEA-HELM."""
    known = facts()
    head = (
        f"# A suite of SEA-HELM {known['version']}, made by `dudi seahelm prepare`; languages as "
        "there (tl is Filipino).\n"
    )
    return head + yaml.safe_dump({SUITE_NAME: tasks}, sort_keys=False, width=2000)


def split_languages(languages: str | list[str] | None) -> list[str]:
    """`id,th` or a list; None: all of the suite."""
    if languages is None:
        return list(facts()["suite"])
    words = languages.split(",") if isinstance(languages, str) else list(map(str, languages))
    found = [word.strip() for word in words if word.strip()]
    if not found:
        raise ValueError(f"languages must name at least one, got {languages!r}")
    return found


# ---- the checkpoint ------------------------------------------------------------------------------


def _tokenizer(source: Source, chat_template: str | None, base_model: bool) -> Any:
    """The checkpoint's, with a chat template unless the model is a base model."""
    tokenizer = load_own_tokenizer(source)
    if chat_template is not None:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise ValueError(f"chat_template must be a Jinja file, got {chat_template!r}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if not base_model and not tokenizer.chat_template:
        raise ValueError(
            f"{source.folder} has no chat template, through which SEA-HELM asks instruct models: "
            "give one with --chat_template FILE, or --base_model to have it asked with examples"
        )
    return tokenizer


def _switches(source: Source) -> str:
    """The chat template's switches that the run was trained with, as model_args has them."""
    path = source.run / "run.json" if source.run else None
    config = json.loads(path.read_text(encoding="utf-8")).get("config") if path else None
    given = (config or {}).get("chat_template_kwargs") or {}
    return "".join(f",{name}={given[name]}" for name in TEMPLATE_SWITCHES if name in given)


def _check_serving(model_type: str, model_args: str | None) -> None:
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    if model_args is not None and any(character.isspace() for character in model_args):
        raise ValueError(f"model_args must be name=value,... without spaces, got {model_args!r}")


# ---- all of it -----------------------------------------------------------------------------------


def _write(prepared: Prepared, folder: Path) -> None:
    (folder / SUITE_FILE).write_text(suite_text(prepared.suite), encoding="utf-8")
    script = folder / "run.sh"
    script.write_text(_script(prepared), encoding="utf-8")
    script.chmod(0o755)
    text = json.dumps(asdict(prepared), indent=1, ensure_ascii=False)
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _script(prepared: Prepared) -> str:
    """run.sh: the words of the command, with the script's own variables among them."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dudi", "data"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    variables = {"MODEL": '"$here/"' + shlex.quote(prepared.model), "OUTPUT": '"$output"'}
    variables |= {"RUN": '"$run"', "SEED": '"$seed"'}
    words = prepared.command("MODEL", "OUTPUT", "RUN", "SEED")
    return environment.get_template("seahelm_run.sh.j2").render(
        name=prepared.model,
        seahelm=facts(),
        command=" ".join(variables.get(word) or shlex.quote(word) for word in words),
    )


def prepare(
    model_name_or_path: str,
    output_dir: str | Path,
    *,
    languages: str | list[str] | None = None,
    no_judge_tasks: bool = False,
    no_metricx: bool = False,
    base_model: bool = False,
    chat_template: str | None = None,
    name: str | None = None,
    model_type: str = "vllm",
    model_args: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write all that an evaluation by SEA-HELM needs to a folder, which is whole or not there.

    Args:
        model_name_or_path, dtype, overwrite: as of `export_model`.
        languages: such as `id,th`; by default all of the suite (id, vi, th, ta, tl, ms, my).
        no_judge_tasks: leave out what an LLM judges (MT-Bench, Kalahi's judge, LINDSEA's criteria).
        no_metricx: leave out translation, which MetricX-24 XXL scores (13B parameters).
        base_model: have it asked with five examples, without a chat template; leaves out what
            needs instructions.
        name: the model's name in SEA-HELM's results; by default the run's or the model's.
        model_type, model_args: as of SEA-HELM; by default vLLM over all GPUs, with the switches of
            the chat template that the run was trained with.

    Raises:
        ValueError: a bad option, or a checkpoint that can't be exported or has no chat template.
    """
    _check_serving(model_type, model_args)
    check_dtype(dtype)
    tasks = suite(
        split_languages(languages),
        left_out=left_out(
            no_judge_tasks=no_judge_tasks, no_metricx=no_metricx, base_model=base_model
        ),
    )
    source, path = find_source(model_name_or_path), Path(output_dir)
    check_target(path, overwrite, SETTINGS_FILE)
    if (path / RESULTS).exists():
        raise ValueError(f"output_dir {path} has results of SEA-HELM in it: not overwritten")
    check_apart(source, path)
    called = name or source.name
    if "/" in called or called in ("", ".", "..", RESULTS, SUITE_FILE, SETTINGS_FILE):
        raise ValueError(f"name must be that of a folder, got {called!r}")
    tokenizer = _tokenizer(source, chat_template, base_model)
    given = MODEL_ARGS + _switches(source) if model_args is None else model_args
    prepared = Prepared(called, tasks, model_type, given, base_model, facts()["version"])
    _stage(source, prepared, path, tokenizer, dtype)
    if console is not None:
        _tell(prepared, path, console)
    return path


def _stage(
    source: Source, prepared: Prepared, path: Path, tokenizer: Any, dtype: str | None
) -> None:
    """Everything beside its place, then one rename."""
    staged = staging_of(path)
    try:
        with disk_errors(path):
            write_export(source, staged / "export", dtype=dtype, tokenizer=tokenizer)
            whole = staged / "whole"
            whole.mkdir()
            seal(staged / "export", whole / prepared.model)
            _write(prepared, whole)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            put_in_place(whole, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _tell(prepared: Prepared, path: Path, console: Console) -> None:
    for language, names in prepared.suite.items():
        console.print(f"[bold]{language}[/] {', '.join(names)}", highlight=False)
    console.print(
        f"Then: dudi seahelm run --prepared {path} --checkout SEA-HELM, or sh {path / 'run.sh'} "
        "SEA-HELM where DuDi is not installed.",
        soft_wrap=True,
        highlight=False,
    )


def read_prepared(path: str | Path) -> Prepared:
    """What `prepare` wrote, its model whole.

    Raises:
        ValueError: a folder that `prepare` did not write, or a model with a flaw.
    """
    folder = Path(path)
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise ValueError(f"prepared must be a folder of `dudi seahelm prepare`, got {folder}")
    try:
        content = checked_object(json.loads(file.read_text(encoding="utf-8")), str(file))
        prepared = Prepared(**content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not what `dudi seahelm prepare` writes: {error}") from error
    found = flaw(folder / prepared.model)
    if found is not None:
        raise ValueError(f"the model {folder / prepared.model} is not whole: {found}")
    return prepared
