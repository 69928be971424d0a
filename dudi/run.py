"""`dudi train`: from a recipe to a run folder that can be resumed, evaluated and reported.

Everything that can be wrong is checked before the folder is touched. The folder then holds run.json
(what was run and where), metrics.jsonl, checkpoint-N/, evaluation.json (before and after, where
there is a test set), model/ and report.html.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import sys
import time
import warnings
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from dudi.callbacks import ConsoleProgress, write_text
from dudi.checkpoints import (
    MAP_FILE,
    check_inputs_stay,
    check_output_dir,
    clear_run,
    last_checkpoint,
)
from dudi.config import DuDiConfig, ScriptArguments, nearest, to_public_dict
from dudi.data import load_data
from dudi.evaluate import Evaluation, evaluate_model, evaluation_table
from dudi.models import load_model, load_tokenizer, refuse_adapter
from dudi.report import write_report
from dudi.trainer import DuDiTrainer

MOMENT = 1.0  # seconds that gloo's threads are given to come to rest


def environment() -> dict[str, Any]:
    """What a reader needs to judge the figures: versions and hardware."""
    from dudi import __version__

    cuda = torch.cuda.is_available()
    return {
        "dudi": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())} x {os.cpu_count()}"


class Interrupted(KeyboardInterrupt):
    """A Ctrl-C; the message says what there is and how to go on."""


def build_tokenizer(script: ScriptArguments) -> Any:
    if script.tokenizer_name_or_path is not None:
        return load_tokenizer(script.tokenizer_name_or_path, "tokenizer_name_or_path")
    if script.model_name_or_path is None:
        raise ValueError("tokenizer_name_or_path must be given with model_config")
    return load_tokenizer(script.model_name_or_path, "model_name_or_path")


def build_model(script: ScriptArguments, config: DuDiConfig, tokenizer: Any) -> Any:
    """The student: from a checkpoint, or new from `model_config` with weights drawn by the seed."""
    if script.model_name_or_path is not None:
        kwargs = {"dtype": torch.float32, **(config.model_init_kwargs or {})}
        refuse_adapter(script.model_name_or_path)
        return load_model(script.model_name_or_path, kwargs, "model_name_or_path")
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **(script.model_config or {}),
    }
    set_seed(config.seed)
    return _new_model(settings)


def _new_model(settings: dict[str, Any]) -> Any:
    config = new_model_config(settings)
    try:
        return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ValueError(f"model_config can't be built: {error}") from error


def new_model_config(settings: dict[str, Any]) -> Any:
    """The transformers configuration of `model_config`; a setting that it lacks is an error."""
    try:
        known = AutoConfig.for_model(settings["model_type"]).to_dict().keys()
        for name in settings:
            if name not in known and name != "model_type":
                raise ValueError(f"it has no setting {name!r}{nearest(name, known)}")
        return AutoConfig.for_model(**settings)
    except Exception as error:
        raise ValueError(f"model_config can't be built: {error}") from error


def build_peft_config(script: ScriptArguments) -> Any:
    if not script.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(**lora_settings(script))


def lora_settings(script: ScriptArguments) -> dict[str, Any]:
    """Fields of peft's LoraConfig."""
    return {
        "r": script.lora_r,
        "lora_alpha": script.lora_alpha,
        "lora_dropout": script.lora_dropout,
        "target_modules": script.lora_target_modules,
        "task_type": "CAUSAL_LM",
    }


def load_test_set(script: ScriptArguments) -> Any:
    """The held-out data of a recipe, or None where it names none."""
    if script.dataset_test_name is None and script.dataset_test_split is None:
        return None
    return load_data(
        script.dataset_test_name or str(script.dataset_name),
        name=script.dataset_config,
        split=script.dataset_test_split or "train",
    )


def build_trainer(
    script: ScriptArguments, config: DuDiConfig, train: Any = None, test: Any = None
) -> DuDiTrainer:
    """The trainer of a recipe, every input checked; datasets are loaded where none are given."""
    tokenizer = build_tokenizer(script)
    if train is None:
        train = load_data(
            str(script.dataset_name),
            name=script.dataset_config,
            split=script.dataset_train_split,
        )
        test = load_test_set(script)
    if test is None and config.eval_strategy != "no":
        strategy = IntervalStrategy(config.eval_strategy).value
        raise ValueError(
            f"eval_strategy {strategy!r} needs a test set: give dataset_test_split or "
            "dataset_test_name"
        )
    return DuDiTrainer(
        model=build_model(script, config, tokenizer),
        args=config,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=build_peft_config(script),
    )


def count_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def describe(trainer: DuDiTrainer, script: ScriptArguments, command: str | None) -> dict[str, Any]:
    """The content of run.json at the start of a run."""
    train: Any = trainer.train_dataset
    teacher = trainer.teacher
    return {
        "title": Path(str(trainer.args.output_dir)).name,
        "command": command or shlex.join(sys.argv),
        "script": {k: v for k, v in asdict(script).items() if v is not None},
        "config": to_public_dict(trainer.args),
        "environment": environment(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "parameters": count_parameters(trainer.model),
        "teacher_parameters": count_parameters(teacher) if teacher is not None else None,
        "languages": sorted(set(train["language"]) - {""}),
        "data": trainer.data_counts,
        "vocabulary": trainer.bridge.describe(),
    }


def quiet_libraries() -> None:
    """No bars and no chatter of the libraries between our own lines."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each 8-bit product
    for module in ("transformers", "peft"):  # of libraries to each other
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def console_style(trainer: DuDiTrainer, console: Console, label: str) -> None:
    """One readable line a log event in place of bars and dicts."""
    quiet_libraries()  # the Trainer turns bars on again
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(ConsoleProgress(console, label))


def evaluate_and_write(
    trainer: DuDiTrainer, label: str, script: ScriptArguments, console: Console
) -> Evaluation:
    """Evaluate the student as it is and keep the result in evaluation.json under `label`."""
    config: Any = trainer.args
    console.print(f"[bold]evaluate[/] {label}: {len(trainer.eval_dataset)} rows")
    result = evaluate_model(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        trainer.eval_dataset,
        teacher=trainer.teacher,
        bridge=trainer.bridge,
        batch_size=config.per_device_eval_batch_size,
        generate=script.eval_generate_rows != 0,
        generate_rows=script.eval_generate_rows,
        max_completion_length=config.max_completion_length,
        padding_free=config.padding_free,
    )
    path = Path(config.output_dir) / "evaluation.json"
    if trainer.is_world_process_zero():
        write_text(path, json.dumps({**_read(path), label: result.to_dict()}, ensure_ascii=False))
    return result


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_info(trainer: DuDiTrainer, info: dict[str, Any]) -> None:
    if trainer.is_world_process_zero():
        text = json.dumps(info, indent=1, ensure_ascii=False)
        write_text(Path(str(trainer.args.output_dir)) / "run.json", text)


def _say_counts(trainer: DuDiTrainer, console: Console) -> None:
    """How much data there is, and what was too long."""
    for split, counts in trainer.data_counts.items():
        told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n)
        console.print(f"[bold]data[/] {split}: {told}")


def _base_of(adapter: str | None) -> str | None:
    """The base model that an adapter's folder names."""
    path = Path(adapter or "") / "adapter_config.json"
    found = _read(path).get("base_model_name_or_path") if adapter else None
    return found if isinstance(found, str) else None


def _path(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _check_inputs_stay(
    script: ScriptArguments, config: DuDiConfig, config_file: str | None
) -> None:
    inputs = {
        "config": config_file,
        "the base of the teacher": _base_of(config.teacher_model_name_or_path),
        "model_name_or_path": script.model_name_or_path,
        "tokenizer_name_or_path": script.tokenizer_name_or_path,
        "teacher_tokenizer_name_or_path": config.teacher_tokenizer_name_or_path,
        "teacher_cache": config.teacher_cache,
        "lexicon": config.lexicon,
        "vocabulary_verbalizer": _path(config.vocabulary_verbalizer),
        "teacher_model_name_or_path": config.teacher_model_name_or_path,
        "dataset_name": script.dataset_name,
        "dataset_test_name": script.dataset_test_name,
    }
    check_inputs_stay(str(config.output_dir), inputs)


def save_map(trainer: DuDiTrainer) -> None:
    """What lies between the vocabularies, for other runs: `vocabulary_verbalizer` reads it."""
    if trainer.bridge.verbalizer is not None:
        folder = Path(str(trainer.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trainer.bridge.verbalizer.save(folder / MAP_FILE)


def _begin_folder(trainer: DuDiTrainer, info: dict[str, Any]) -> None:
    """Clear what an earlier run left; every rank has looked at the folder before."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        clear_run(str(trainer.args.output_dir))
        save_map(trainer)
    _write_info(trainer, info)


def _how_to_go_on(trainer: DuDiTrainer) -> str:
    """What a Ctrl-C leaves; a run that took no step leaves nothing."""
    folder, step = Path(str(trainer.args.output_dir)), trainer.state.global_step
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        return (
            f"Stopped at step {step}; {checkpoint.name} is saved in {folder}. "
            "To go on, run the same command with --resume."
        )
    if (folder / "model").is_dir():
        return f"Stopped after training; the model is saved in {folder / 'model'}."
    if step == 0:
        if trainer.is_world_process_zero():
            clear_run(folder)
        return f"Stopped before the first step; nothing of the run is left in {folder}."
    return f"Stopped at step {step} without a checkpoint; --overwrite starts anew."


def run_training(
    script: ScriptArguments,
    config: DuDiConfig,
    *,
    console: Console | None = None,
    command: str | None = None,
    train: Any = None,
    test: Any = None,
    label: str = "train",
    config_file: str | None = None,
) -> Path:
    """Run one recipe and return its folder.

    `train` and `test` stand in for the datasets that `script` names; `config_file` is where the
    recipe was read from. A run that fails before its first step leaves nothing in the folder. A
    Ctrl-C finishes the step, saves a checkpoint and raises `Interrupted`; running again with
    `resume` goes on from there.
    """
    console = console or Console()
    quiet_libraries()
    check_output_dir(str(config.output_dir), resume=script.resume, overwrite=script.overwrite)
    if script.overwrite:
        _check_inputs_stay(script, config, config_file)
    trainer = build_trainer(script, config, train, test)
    console_style(trainer, console, label)
    info = describe(trainer, script, command)
    _say_counts(trainer, console)
    if script.resume:
        trainer.check_resumable()
        info["started"] = _read(Path(str(config.output_dir)) / "run.json").get(
            "started", info["started"]
        )
    else:
        _begin_folder(trainer, info)
    try:
        return _train_and_evaluate(trainer, script, info, console)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(trainer)) from None
    except Exception:
        begun = trainer.state.global_step > 0 or script.resume
        if not begun and trainer.is_world_process_zero():
            clear_run(str(config.output_dir))
        raise


def leave_ranks() -> None:
    """The last thing that each process of torchrun does; nothing where there is one process alone.

    gloo's threads let go of a collective's tensors a moment after it has ended, and need the GIL
    for that: a process that exits meanwhile is aborted, one that destroys the group waits for ever
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(MOMENT)
        dist.destroy_process_group()


def _train_and_evaluate(
    trainer: DuDiTrainer, script: ScriptArguments, info: dict[str, Any], console: Console
) -> Path:
    folder = Path(str(trainer.args.output_dir))
    evaluating = script.evaluate and trainer.eval_dataset is not None
    if evaluating and not script.resume:
        evaluate_and_write(trainer, "before", script, console)
    spent = _read(folder / "run.json").get("seconds", 0.0) if script.resume else 0.0
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=script.resume)
    info |= {
        "steps": trainer.state.global_step,
        "seconds": round(spent + time.monotonic() - started, 1),
    }
    _write_info(trainer, info)
    if trainer.interrupted:
        raise KeyboardInterrupt
    trainer.save_whole_model(folder / "model")
    if evaluating:
        evaluate_and_write(trainer, "after", script, console)
        console.print(evaluation_table(_read(folder / "evaluation.json")))
    if trainer.is_world_process_zero():
        console.print(f"Report: {write_report(folder)}")
    return folder
