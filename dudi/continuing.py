"""A transformers Trainer that can be killed: checkpoints are whole or not there, a resumed run goes
on exactly, and no step is taken whose loss or gradients are not finite.

A checkpoint is written beside its place and renamed (saving.py) once every rank has put in its
part. Beside the Trainer's own state it has what this run must agree with when it goes on, samples
that wait for their step, scores that are known, the lagged reference, and the log window that it
cuts in two. One of a sharded student is written and read as that of a whole one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from dudi.bridge import Bridge
from dudi.callbacks import METRICS_FILE, Continuity, write_text
from dudi.checkpoints import (
    CONFIG_FILE,
    STATE_FILE,
    WINDOW_FILE,
    last_checkpoint,
    model_mismatches,
    run_mismatches,
    why_not_whole,
)
from dudi.config import DuDiConfig, to_public_dict
from dudi.data import content_hash
from dudi.finite import NonFiniteLossError, gradients_are_finite, weights_are_finite
from dudi.meter import Meter
from dudi.quarantine import Quarantine
from dudi.reference import KnownScores
from dudi.sampling import Sampling
from dudi.saving import (
    STAGING,
    discard_staging,
    disk_errors,
    put_in_place,
    run_disk_errors,
    seal,
    sync,
)
from dudi.sharding import load_optimizer_state, load_weights, whole_optimizer_state, whole_weights
from dudi.signals import causal_lm


class ContinuingTrainer(Trainer):
    """What is declared here belongs to the subclass that fills it in."""

    args: DuDiConfig
    model: Any
    train_dataset: Any
    quarantine: Quarantine
    bridge: Bridge
    known_scores: KnownScores
    meter: Meter
    reference: Any
    sampling: Sampling
    sharded: bool  # by FSDP2
    _adapter: dict[str, Any] | None
    _whose: str | None  # the teacher's identity

    def __init__(self, *, callbacks: list[Any], **kwargs: Any) -> None:
        self._continuity = Continuity()
        self._step_rows: list[int] = []  # the dataset rows of this step
        self._earlier_loss = 0.0  # summed over the steps before this process's
        self._staging = False  # a checkpoint is being written
        self._window: dict[str, Any] | None = None  # log window of the checkpoint resumed from
        super().__init__(callbacks=[self._continuity, *callbacks], **kwargs)
        self._continuity.trainer = self

    # ---- what is not finite --------------------------------------------------------------------

    def _require_finite(self, finite: bool, what: str, rows: list[int]) -> None:
        """Stop every rank before the step is taken unless all is well on each of them."""
        if not self.any_rank(not finite):
            return
        told = f"{what}, dataset rows {rows}" if not finite else "another rank is at fault"
        raise NonFiniteLossError(
            f"step {self.state.global_step + 1}: {told}; the step was not taken. {self._last_good}"
        )

    @property
    def _last_good(self) -> str:
        good = last_checkpoint(self._run_dir)
        return f"The last good checkpoint is {good}." if good else "There is no checkpoint yet."

    def check_gradients(self) -> None:
        """A finite loss can have gradients that are not. Under fp16 the gradient scaler sees to
        them: it skips the step and lowers its scale."""
        if getattr(self.accelerator, "scaler", None) is None:
            finite = gradients_are_finite(self.model)
            self._require_finite(finite, "a gradient is not finite", self._step_rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.drain(self.accelerator)
            logs["num_tokens"] = float(self.state.num_input_tokens_seen)
            if self.args.skips_bad:
                logs["bad_rows"] = float(len(self.quarantine))
        if "train_loss" in logs:  # of the whole run, not of the part since a checkpoint
            whole = self._earlier_loss + self._total_loss_scalar
            logs["train_loss"] = whole / max(1, self.state.global_step)
        super().log(logs, start_time)

    # ---- checkpoints ---------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` goes on from the newest whole checkpoint.

        The first Ctrl-C finishes the step and saves a checkpoint; `self.interrupted` is then True.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given")
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self.sampling.clear()
        if self.args.should_save:
            discard_staging(self._run_dir)
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
            self._load_samples(checkpoint)
            if self.reference is not None:
                self.reference.load(checkpoint)
            self._window = json.loads((checkpoint / WINDOW_FILE).read_text(encoding="utf-8"))
        self._continuity.install()
        try:
            with run_disk_errors(self._run_dir, self._how_to_go_on):
                return super().train(str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            self._continuity.remove()

    def check_resumable(self) -> None:
        """Raise what `train(resume_from_checkpoint=True)` would, before anything else is done."""
        checkpoint = self._checkpoint_to_resume(True)
        assert checkpoint is not None
        self._check_checkpoint(checkpoint)

    @property
    def _run_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def interrupted(self) -> bool:
        """Whether a Ctrl-C ended the run before its last step (a checkpoint was saved)."""
        return self._continuity.stopped

    def any_rank(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag)).to(self.args.device), "sum"))

    def _checkpoint_to_resume(self, resume: str | bool | None) -> Path | None:
        if not resume:
            return None
        if resume is not True:
            why = why_not_whole(Path(resume))
            if why is not None:
                raise ValueError(
                    f"resume_from_checkpoint={resume!r} is not a whole checkpoint: {why}"
                )
            return Path(resume)
        found = last_checkpoint(self._run_dir)
        if found is None:
            raise ValueError(
                f"there is no whole checkpoint in {self.args.output_dir} to resume from"
            )
        return found

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint of this run must agree with: settings, adapter, data."""
        train: Any = self.train_dataset
        return {
            "config": to_public_dict(self.args),
            "adapter": self._adapter,
            "teacher": self._whose,
            "data": {"rows": len(train), "content": content_hash(train)},
            "map": self.bridge.fingerprint,
        }

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another model, recipe or data, before anything is loaded."""
        wrong = model_mismatches(causal_lm(self.model).config, checkpoint)
        wrong += run_mismatches(self._identity, checkpoint)
        if self.reference is not None and not wrong:
            wrong += self.reference.mismatches(checkpoint)
        if wrong:
            raise ValueError(f"{checkpoint} does not match this run: " + "; ".join(wrong))

    def restore_window(self) -> None:
        """Go on with the log window that the checkpoint cut in two."""
        if self._window is not None:
            self._tr_loss += self._window["loss"]
            self._earlier_loss = self._window["total"]
            self._globalstep_last_logged = self._window["last_logged"]
            self.meter.load(self._window["meter"], self.accelerator.num_processes)
            self._window = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        loss = self._tr_loss.detach().clone()
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "mean")
        self._window_to_save = {
            "loss": loss.item(),
            "total": self._earlier_loss + self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "meter": self.meter.state(self.accelerator),
        }
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        self._staging = True
        try:
            with disk_errors(final, self._how_to_go_on):
                super()._save_checkpoint(model, trial)
                self._complete(final)
        finally:
            self._staging = False
            if self.args.should_save:
                discard_staging(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _how_to_go_on(self) -> str:
        return f"{self._last_good} Make room there and resume."

    def _complete(self, final: Path) -> None:
        """Every rank has written its part; then the checkpoint gets its name, and old ones go."""
        staged = final.parent / STAGING / final.name
        best = self.state.best_model_checkpoint == str(staged)
        if best:
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        if best:
            self.state.save_to_json(str(staged / STATE_FILE))
        if (final.parent / METRICS_FILE).exists():
            sync(final.parent / METRICS_FILE)  # a run that goes on appends to it
        seal(staged, final)
        rotate_checkpoints(
            str(final.parent),
            self.args.save_total_limit,
            self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # the Trainer would push before the rename
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """What else each rank has of its own: samples to come, and scores that it knows."""
        super()._save_rng_state(output_dir)
        self.sampling.begin_anew()
        own = self.sampling.state() | self.known_scores.state()
        save_file(own, Path(output_dir) / self._samples_file)
        if self.reference is not None and (self.sharded or self.args.should_save):
            self.reference.save(output_dir)

    def _load_samples(self, checkpoint: Path) -> None:
        path = checkpoint / self._samples_file
        if not path.exists():
            raise ValueError(f"{checkpoint} is not whole: {path.name} is not there")
        saved = load_file(path)
        self.sampling.load(saved)
        self.known_scores.load(saved)

    @property
    def _samples_file(self) -> str:
        return f"samples-{self.accelerator.process_index}.safetensors"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but weights that are not finite are never written."""
        if self.any_rank(not weights_are_finite(self.model)):
            raise NonFiniteLossError(
                f"the weights are not finite after step {self.state.global_step}, dataset rows "
                f"{self._step_rows}; they were not saved. {self._last_good}"
            )
        super().save_model(output_dir, _internal_call)

    def save_whole_model(self, folder: str | Path) -> None:
        """`save_model` to a folder of its own, which is whole or not there."""
        final = Path(folder)
        staged = final.parent / STAGING / final.name
        try:
            with disk_errors(final, self._how_to_go_on):
                self.save_model(str(staged))
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    put_in_place(staged, final)
        finally:
            if self.args.should_save:
                discard_staging(final.parent)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.sharded:
            state_dict = whole_weights(self.model)
            if not self.args.should_save:
                return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft: no hub to compare the base with
            super()._save(output_dir, state_dict)
        folder = Path(output_dir) if output_dir is not None else self._run_dir
        if self.args.should_save and folder.name.startswith("checkpoint-"):
            write_text(folder / CONFIG_FILE, json.dumps(self._identity, indent=1))
            write_text(folder / WINDOW_FILE, json.dumps(self._window_to_save))

    # ---- of a sharded student, written and read as of a whole one --------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_state(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model, resume_from_checkpoint)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Gradients are reduced after each micro-batch: whole ones are never kept."""
        yield

    def _load_best_model(self) -> None:
        if not self.sharded:
            return super()._load_best_model()
        load_weights(self.model, str(self.state.best_model_checkpoint))
