"""DuDiTrainer: a transformers Trainer whose step carries the three signals.

Before each optimizer step the student draws y- for every micro-batch of the step, so that all means
are over the global batch (ranks and accumulation). Then, per micro-batch: hidden states of student
and teacher over [y+; y-], the teacher in its own tokens under what the verbalizer makes of the
prompt (teaching.py), one `linear_dudi_loss` inside the wrapped model's forward. All else
(optimizer, schedule, checkpoints, logs) is the Trainer's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import TrainOutput

from dudi.bridge import Bridge, MapSettings, build_bridge
from dudi.callbacks import Continuity, MetricsFile, write_text
from dudi.checkpoints import (
    CONFIG_FILE,
    WINDOW_FILE,
    is_whole,
    last_checkpoint,
    model_mismatches,
    run_mismatches,
)
from dudi.config import DuDiConfig, to_public_dict
from dudi.data import DuDiCollator, content_hash, prepare_dataset
from dudi.finite import NonFiniteLossError, gradients_are_finite, weights_are_finite
from dudi.known import KnownTeacher
from dudi.meter import Meter
from dudi.models import (
    adapter_settings,
    check_models,
    check_positions,
    disable_dropout,
    load_model,
    load_tokenizer,
    refuse_adapter,
)
from dudi.reference import Reference
from dudi.rollout import Rollout, generate
from dudi.signals import Packed, causal_lm, lm_head, pack, redirected_forward, response_hidden
from dudi.teacher_cache import check_complete, open_cache
from dudi.teaching import (
    Lesson,
    Responses,
    Taught,
    Teaching,
    check_signals,
    context_verbalizer,
    signal_options,
)
from dudi_kernels import linear_dudi_loss, sequence_log_prob


@dataclass
class MicroBatch:
    """One micro-batch, sampled and packed, on the CPU."""

    student: Packed
    lesson: Lesson | None
    rows: list[int]  # the dataset rows in it
    rollout: Rollout | None
    prompts: list[Tensor]
    counts: Tensor  # (5,) rows of y+, rows of y-, pairs; rows of y+ and of y- that are taught
    totals: Tensor  # (5,) the same over the global batch


class DuDiTrainer(Trainer):
    """Train `model` with off-policy KD, on-policy KD and an online preference in every step.

    Args:
        model: a causal LM, or its name or path (loaded in float32 unless `args.model_init_kwargs`
            says otherwise).
        teacher_model: a causal LM, or its name or path; default `args.teacher_model_name_or_path`.
            Not loaded where no signal needs it. It may have a tokenizer and a head of its own.
        args: a `DuDiConfig`.
        train_dataset, eval_dataset: datasets with `prompt` and `completion` (text or messages), or
            `messages`; optionally `language` and the verbalizer's fields.
        processing_class: the tokenizer; default the model's own.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the student in an adapter (`peft`).
        teacher_processing_class: the teacher's tokenizer; default
            `args.teacher_tokenizer_name_or_path`, else its own, else the student's.
    """

    # the Trainer's own annotations admit what __init__ rules out
    args: DuDiConfig
    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: DuDiConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
    ):
        args = args if args is not None else DuDiConfig(output_dir="dudi-output")
        args.dataloader_pin_memory &= torch.accelerator.is_available()
        tokenizer = processing_class or self._own_tokenizer(model)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, never from pad ids
        refuse_adapter(model)
        student = load_model(
            model, {"dtype": torch.float32, **(args.model_init_kwargs or {})}, "model"
        )
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # the adapter's first weights are drawn
            student = get_peft_model(student, peft_config)
        teacher = self._load_teacher(teacher_model, args)
        check_models(student, teacher)
        self.known = teacher if isinstance(teacher, KnownTeacher) else None
        self.bridge = Bridge(tokenizer)
        if teacher is not None:
            self.bridge = build_bridge(
                student,
                teacher,
                tokenizer,
                teacher_processing_class or args.teacher_tokenizer_name_or_path,
                MapSettings.of(args),
                _languages(train_dataset),
            )
        self._check_reporting(args)
        if args.disable_dropout:
            disable_dropout(student)

        self.data_counts: dict[str, dict[str, int]] = {}
        self.verbalizer = context_verbalizer(args, train_dataset)
        if teacher is not None:
            check_signals(student, teacher, self.bridge, args)
        self.meter = Meter()
        self.teaching = Teaching(
            self.bridge, self.verbalizer, args, tokenizer, self.meter, train_dataset
        )
        train_dataset = self._prepare(train_dataset, tokenizer, args, "train")
        eval_dataset = self._prepare(eval_dataset, tokenizer, args, "eval")
        if train_dataset is not None:
            check_positions(student, teacher, train_dataset, args)
        self._continuity = Continuity()
        super().__init__(
            model=student,
            args=args,
            data_collator=DuDiCollator(tokenizer.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[MetricsFile(), self._continuity, *(callbacks or [])],
            optimizers=optimizers,
        )
        self._continuity.trainer = self
        self.loss_is_scaled_for_ga = True  # our denominators are global already
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        needs_copy = args.preference_weight > 0 and args.reference in ("initial", "lagged")
        self.reference = Reference(self.model) if needs_copy else None
        self._step_rows: list[int] = []  # the dataset rows of this step
        self._earlier_loss = 0.0  # summed over the steps before this process's
        self._window: dict[str, Any] | None = None  # log window of the checkpoint resumed from

    # ---- construction --------------------------------------------------------------------------

    @staticmethod
    def _own_tokenizer(model: str | PreTrainedModel) -> PreTrainedTokenizerBase:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        if not name:
            raise ValueError("processing_class must be given: the model does not name a tokenizer")
        return load_tokenizer(name, "the tokenizer of model")

    @staticmethod
    def _load_teacher(teacher_model: Any, args: DuDiConfig) -> Any:
        if not args.needs_teacher:
            return None
        source = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        argument = "teacher_model" if teacher_model is not None else "teacher_model_name_or_path"

        def load() -> Any:
            return source and load_model(source, args.teacher_model_init_kwargs, argument)

        if args.teacher_cache is not None:
            return open_cache(args, load)
        if source is None:
            raise ValueError(
                "teacher_model (or teacher_model_name_or_path) must be given: off_policy_weight="
                f"{args.off_policy_weight} and on_policy_weight={args.on_policy_weight} with "
                f"reference={args.reference!r} need a teacher; set both weights to 0 and "
                "ce_weight to 1 to train without one"
            )
        return load()

    @staticmethod
    def _check_reporting(args: DuDiConfig) -> None:
        from transformers.integrations import get_reporting_integration_callbacks

        try:
            for callback in get_reporting_integration_callbacks(args.report_to):
                callback()
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"report_to {args.report_to} can't be used: {error}") from error

    def _prepare(self, dataset: Any, tokenizer: Any, args: DuDiConfig, split: str) -> Any:
        if dataset is None or "completion_ids" in dataset.column_names:
            return dataset
        prepared, counts = prepare_dataset(
            dataset,
            tokenizer,
            teacher_tokenizer=self.bridge.tokenizer,
            verbalizer=self.verbalizer,
            pairing=self.bridge.pairing,
            chat_template_kwargs=args.chat_template_kwargs,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            max_teacher_prompt_length=args.max_teacher_prompt_length,
            max_unpaired=args.max_unpaired,
            overlong=args.overlong,
            split_name=split,
        )
        self.data_counts[split] = counts
        check_complete(self.known, prepared, args, self.bridge.pairing, split)
        return prepared

    # ---- sampling and packing ------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one optimizer step, with y- drawn and all denominators known."""
        if self.args.reference == "lagged" and self.reference is not None:
            step = self.state.global_step
            if step > 0 and step % self.args.reference_sync_steps == 0:
                self.reference.refresh(self.model)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        micro = [self._micro_batch(batch, i) for i, batch in enumerate(batches)]
        if not micro:
            return [], None
        self._step_rows = [row for m in micro for row in m.rows]
        totals = torch.stack([m.counts for m in micro]).sum(0)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(device), "sum").cpu()
        for m in micro:
            m.totals = totals
        self._log_completions(micro[0])
        return [{"batch": m} for m in micro], int(totals[0])

    def _micro_batch(self, batch: dict[str, Tensor], index: int) -> MicroBatch:
        batch = {name: tensor.cpu() for name, tensor in batch.items()}
        prompts, rows = _unpad(batch, "prompt"), batch["row"].tolist()
        rollout = self._sample(prompts, index, rows) if self.args.needs_samples else None
        responses = {0: _unpad(batch, "completion")} if self.args.needs_given else {}
        if rollout is not None:
            responses[1] = rollout.completions
        order = [(i, side) for i in range(len(prompts)) for side in responses]
        packed = Responses(
            [responses[side][i] for i, side in order],
            [i for i, _ in order],
            [2 * i + side for i, side in order],
        )
        pad = self.processing_class.pad_token_id
        student = pack([prompts[i] for i in packed.prompts], packed.ids, pad, packed.segments)
        lesson = None
        if self.teacher is not None:
            prompts_seen, plain = (_unpad(batch, n) for n in ("teacher_prompt", "plain_prompt"))
            lesson = self.teaching.lesson(packed, rows, prompts_seen, plain, rollout)
        rows_given, rows_drawn = (sum(map(len, responses.get(side, []))) for side in (0, 1))
        taught = torch.zeros(2) if lesson is None else lesson.taught(student.segment_ids)
        counts = torch.tensor([rows_given, rows_drawn, len(prompts), *taught])
        return MicroBatch(
            student=student,
            lesson=lesson,
            rows=rows,
            rollout=rollout,
            prompts=prompts,
            counts=counts,
            totals=counts,
        )

    def _sample(self, prompts: list[Tensor], index: int, rows: list[int]) -> Rollout:
        """Draw y-; the seed depends on run, step, micro-batch and rank only."""
        position = self.state.global_step * self.args.gradient_accumulation_steps + index
        seed = (self.args.seed, position, self.accelerator.process_index)
        longest = self.args.max_completion_length
        assert longest is not None  # DuDiConfig saw to it
        rollout = generate(
            self.accelerator.unwrap_model(self.model),
            prompts,
            max_completion_length=longest,
            eos_token_id=self.processing_class.eos_token_id,
            pad_token_id=self.processing_class.pad_token_id,
            temperature=self.args.rollout_temperature,
            top_p=self.args.top_p,
            top_k=self.args.top_k,
            seed=hash(seed) % 2**63,
        )
        self._require_finite(
            rollout.finite, "the student's logits are not finite in sampling", rows
        )
        lengths = [len(c) for c in rollout.completions]
        clipped = rollout.finish_reasons.count("length")
        self.meter.add("completions/mean_length", sum(lengths), len(lengths))
        self.meter.add("completions/clipped_ratio", clipped, len(lengths))
        return rollout

    def greedy_sample(self, prompt: Tensor) -> Rollout:
        """What the student would write without chance."""
        assert self.args.max_completion_length is not None
        return generate(
            self.accelerator.unwrap_model(self.model),
            [prompt],
            max_completion_length=self.args.max_completion_length,
            eos_token_id=self.processing_class.eos_token_id,
            pad_token_id=self.processing_class.pad_token_id,
            temperature=0.0,
        )

    # ---- the loss ------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # micro-batches move to the device in compute_loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch: MicroBatch = inputs["batch"]
        device = self.accelerator.device
        student = batch.student.to(device)
        with self.accelerator.autocast():
            taught = None
            if batch.lesson is not None:
                teacher = self.accelerator.unwrap_model(self.teacher)
                taught = self.teaching.teach(teacher, batch.lesson, len(student.targets), device)
            reference = self._reference_log_prob(student)
            module = self.accelerator.unwrap_model(model)

            def forward() -> Any:
                return self._signals(module, student, taught, reference, batch)

            with redirected_forward(module, forward):
                output = model()
        finite = bool(torch.isfinite(output.loss))
        self._require_finite(finite, f"the loss is {output.loss.item()}", batch.rows)
        self._record(output, student, batch)
        loss = output.loss * self.accelerator.num_processes  # DDP and FSDP average over ranks
        return (loss, output) if return_outputs else loss

    @torch.no_grad()
    def _reference_log_prob(self, packed: Packed) -> Tensor | str | None:
        """(S,) log-probabilities of each response under the reference policy."""
        if self.args.preference_weight == 0 or self.args.reference == "none":
            return None
        if self.reference is None:
            return "teacher"
        module = self.accelerator.unwrap_model(self.model)
        with self.reference.applied(module):
            hidden = response_hidden(module, packed)
            return sequence_log_prob(
                hidden,
                lm_head(module),
                packed.targets,
                packed.segment_ids,
                memory_budget=self.args.memory_budget,
            )

    def _signals(
        self,
        module: nn.Module,
        packed: Packed,
        taught: Taught | None,
        reference: Tensor | str | None,
        batch: MicroBatch,
    ) -> Any:
        a = self.args
        off_rows, on_rows, pairs, off_taught, on_taught = batch.totals.tolist()
        weight = None if taught is None else taught.weight
        if weight is not None:  # cross-entropy has the same denominator, but all of the rows
            off = packed.segment_ids % 2 == 0
            weight = torch.where(off, weight * (off_rows / max(off_taught, 1)), weight)
        return linear_dudi_loss(
            response_hidden(module, packed),
            lm_head(module),
            None if taught is None else taught.hidden,
            None if taught is None else taught.head,
            packed.targets,
            packed.segment_ids,
            preference_weight=a.preference_weight,
            ce_weight=a.ce_weight,
            preference_beta=a.preference_beta,
            preference_length_power=a.preference_length_power,
            reference_log_prob=reference,
            off_policy_rows=off_rows,
            on_policy_rows=on_rows if weight is None else max(on_taught, 1),
            pairs=pairs,
            divergence_weight=weight,
            verbalizer=self.teaching.map_on(packed.targets.device),
            **signal_options(a),
        )

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

    # ---- metrics -------------------------------------------------------------------------------

    def _record(self, output: Any, packed: Packed, batch: MicroBatch) -> None:
        a, add = self.args, self.meter.add
        share = 1 / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        parts = {
            "off_policy_loss": (a.off_policy_weight, output.off_policy_loss),
            "on_policy_loss": (a.on_policy_weight, output.on_policy_loss),
            "preference_loss": (a.preference_weight, output.preference_loss),
            "ce_loss": (a.ce_weight, output.ce_loss),
        }
        for name, (weight, value) in parts.items():
            if weight > 0:
                add(name, value, share)  # parts sum over micro-batches and ranks
        add("entropy", output.entropy.sum(), len(output.entropy))
        if batch.lesson is not None:
            self.teaching.record(output.teacher_entropy, batch.lesson, packed)
        if a.gradient_tolerance > 0:
            add("skipped_logits", output.skipped * len(output.entropy), len(output.entropy))
        self._count_tokens(batch.student)
        chosen, rejected = output.log_probs[0::2], output.log_probs[1::2]
        pairs = len(batch.rows)
        if self.args.needs_given:
            add("logps/chosen", chosen.sum(), pairs)
        if batch.rollout is not None:
            add("logps/rejected", rejected.sum(), pairs)
        if a.preference_weight > 0:
            lengths = torch.bincount(packed.segment_ids, minlength=2 * pairs).clamp(min=1)
            gain = (output.log_probs - output.reference_log_probs) * a.preference_beta
            rewards = gain / lengths**a.preference_length_power
            margins = rewards[0::2] - rewards[1::2]
            add("rewards/chosen", rewards[0::2].sum(), pairs)
            add("rewards/rejected", rewards[1::2].sum(), pairs)
            add("rewards/margins", margins.sum(), pairs)
            add("rewards/accuracies", (margins > 0).float().sum(), pairs)

    def _count_tokens(self, packed: Packed) -> None:
        tokens = torch.tensor(packed.num_tokens)
        if self.accelerator.num_processes > 1:
            tokens = self.accelerator.reduce(tokens.to(self.args.device), "sum")
        self.state.num_input_tokens_seen += int(tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.drain(self.accelerator)
            logs["num_tokens"] = float(self.state.num_input_tokens_seen)
        if "train_loss" in logs:  # of the whole run, not of the part since a checkpoint
            whole = self._earlier_loss + self._total_loss_scalar
            logs["train_loss"] = whole / max(1, self.state.global_step)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x parameters x tokens of the student's forward and backward."""
        batch: MicroBatch = inputs["batch"]
        return 6 * sum(p.numel() for p in self.model.parameters()) * batch.student.num_tokens

    def _log_completions(self, batch: MicroBatch) -> None:
        a = self.args
        due = (self.state.global_step + 1) % max(1, int(a.logging_steps)) == 0
        if not (a.log_completions and due and batch.rollout and self.is_world_process_zero()):
            return
        from rich.console import Console
        from rich.table import Table

        decode = self.processing_class.decode
        table = Table("prompt", "completion", "end", title=f"step {self.state.global_step + 1}")
        shown = zip(
            batch.prompts, batch.rollout.completions, batch.rollout.finish_reasons, strict=True
        )
        for prompt, completion, reason in list(shown)[: a.num_completions_to_print]:
            table.add_row(decode(prompt, skip_special_tokens=True), decode(completion), reason)
        Console().print(table)

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out NLL and divergence from the teacher, overall and for each language."""
        from dudi.evaluate import evaluate_model

        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset must be given, here or to the trainer")
        dataset = self._prepare(dataset, self.processing_class, self.args, metric_key_prefix)
        result = evaluate_model(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            dataset,
            teacher=self.teacher,
            bridge=self.bridge,
            batch_size=self.args.per_device_eval_batch_size,
            generate=False,
        )
        figures = {k: v for k, v in result.mean.items() if k.startswith(("nll", "kl")) and v == v}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in figures.items()}
        metrics[f"{metric_key_prefix}_loss"] = figures["nll_per_token"]
        for language, values in result.languages.items():
            metrics[f"{metric_key_prefix}_{language}_nll_per_char"] = values["nll_per_char"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

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
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
            if self.reference is not None:
                self.reference.load(checkpoint)
            self._window = json.loads((checkpoint / WINDOW_FILE).read_text(encoding="utf-8"))
        self._continuity.install()
        try:
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
            folder = Path(resume)
            if not is_whole(folder):
                raise ValueError(f"resume_from_checkpoint={resume!r} is not a whole checkpoint")
            return folder
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
            "adapter": adapter_settings(causal_lm(self.model), self.model),
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
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but weights that are not finite are never written."""
        if self.any_rank(not weights_are_finite(self.model)):
            raise NonFiniteLossError(
                f"the weights are not finite after step {self.state.global_step}, dataset rows "
                f"{self._step_rows}; they were not saved. {self._last_good}"
            )
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft: no hub to compare the base with
            super()._save(output_dir, state_dict)
        folder = Path(output_dir) if output_dir is not None else self._run_dir
        if self.args.should_save and folder.name.startswith("checkpoint-"):
            write_text(folder / CONFIG_FILE, json.dumps(self._identity, indent=1))
            write_text(folder / WINDOW_FILE, json.dumps(self._window_to_save))
            if self.reference is not None:
                self.reference.save(folder)


def _languages(dataset: Any) -> list[str] | None:
    """Codes that the data has, or None where it does not say."""
    if dataset is None or "language" not in dataset.column_names:
        return None
    return sorted({code for code in dataset.unique("language") if code})


def _unpad(batch: dict[str, Tensor], name: str) -> list[Tensor]:
    """The rows of a padded (B, T) tensor at their own lengths."""
    pairs = zip(batch[f"{name}_ids"], batch[f"{name}_mask"].bool(), strict=True)
    return [ids[mask] for ids, mask in pairs]
