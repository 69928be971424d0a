"""What happens around the Trainer's loop: metrics.jsonl, a console line, a graceful Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dudi.saving import disk_errors

METRICS_FILE = "metrics.jsonl"


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file, nor does a power
    cut leave an empty one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def checked_object(content: Any, place: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{place} must hold a JSON object, got {type(content).__name__}")
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, none where there is no file.

    A last line that a killed run left unfinished is let go; any other that can't be read is an
    error that names file and line.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, must hold JSON: {error}") from error
            break
        records.append(checked_object(record, f"{path}, line {number},"))
    return records


class MetricsFile(TrainerCallback):
    """Append every log event to `metrics.jsonl`; a resumed run drops what it is about to redo."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / METRICS_FILE
        kept = [r for r in read_jsonl(path) if r.get("step", 0) <= state.global_step]
        kept = [r for r in kept if "train_runtime" not in r]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            path = Path(str(args.output_dir)) / METRICS_FILE
            with disk_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ConsoleProgress(TrainerCallback):
    """One line a log event: where the run is, its signals, its speed and what is left."""

    SHOWN = (
        ("loss", "loss"),
        ("off_policy_loss", "off"),
        ("on_policy_loss", "on"),
        ("preference_loss", "pref"),
        ("ce_loss", "ce"),
    )

    def __init__(self, console: Console, label: str = "train"):
        self.console = console
        self.label = label
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()
        self.first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        done = max(1, state.global_step - self.first_step)
        pace = (time.monotonic() - self.started) / done
        left = pace * (state.max_steps - state.global_step)
        values = "  ".join(f"{short} {logs[k]:.3f}" for k, short in self.SHOWN if k in logs)
        self.console.print(
            f"[bold]{self.label}[/] {state.global_step:>5}/{state.max_steps}  {values}"
            f"  [dim]{pace:.2f} s/step, {left:.0f} s left[/]",
            highlight=False,
            soft_wrap=True,
        )


class Continuity(TrainerCallback):
    """No step is lost, spoilt or told twice: the first Ctrl-C finishes the step, saves and stops; a
    step whose gradients are not finite is not taken; a resumed run goes on with the log window that
    the checkpoint cut in two."""

    def __init__(self) -> None:
        self.requested = False  # Ctrl-C came
        self.stopped = False  # and ended the run before its last step
        self.trainer: Any = None
        self._previous: Any = None

    def install(self) -> None:
        self.requested = self.stopped = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def remove(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step and saving; Ctrl-C again stops at once.", flush=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.restore_window()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.check_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.trainer.any_rank(self.requested):
            return
        if state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped = True
        elif state.is_world_process_zero:
            print("That was the last step: the run ends as usual.", flush=True)
