"""DuDiTrainer: a transformers Trainer whose step carries the three signals.

Before each optimizer step the student draws y- for every micro-batch of the step, so that all means
are over the global batch (ranks and accumulation). Then, per micro-batch: hidden states of student
and teacher over [y+; y-], the teacher in its own tokens under what the verbalizer makes of the
prompt (teaching.py), one `linear_dudi_loss` inside the wrapped model's forward. All else
(optimizer, schedule, logs) is the Trainer's; checkpoints are in continuing.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from dudi.bridge import Bridge, MapSettings, build_bridge
from dudi.callbacks import MetricsFile
from dudi.config import WEIGHTS, DuDiConfig
from dudi.continuing import ContinuingTrainer
from dudi.data import DuDiCollator, prepare_dataset
from dudi.known import KnownTeacher, KnownTop
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
from dudi.quantization import is_quantized, prepared_student
from dudi.quarantine import Quarantine, Record
from dudi.reference import KnownScores, make_reference
from dudi.rollout import Rollout
from dudi.sampling import Batch, Drawn, Sampling, unpad
from dudi.served import TeacherServerError, open_server
from dudi.sharding import (
    is_sharded,
    make_mesh,
    release,
    run_inside,
    shard,
)
from dudi.signals import (
    Packed,
    causal_lm,
    check_padding_free,
    compile_body,
    lm_head,
    pack,
    redirected_forward,
    response_hidden,
    vocab_size,
)
from dudi.teacher_cache import answered_rows, open_cache, whose
from dudi.teaching import (
    Lesson,
    Responses,
    Taught,
    Teaching,
    answered,
    check_signals,
    context_verbalizer,
    signal_options,
)
from dudi_kernels import linear_dudi_loss, linear_log_prob, sequence_log_prob


@dataclass
class MicroBatch:
    """One micro-batch, sampled and packed, on the CPU."""

    student: Packed
    lesson: Lesson | None
    rows: list[int]  # the dataset rows in it
    responses: Responses
    drawn: Drawn | None
    prompts: list[Tensor]
    counts: Tensor  # (5,) rows of y+, rows of y-, pairs; rows of y+ and of y- that are taught
    totals: Tensor  # (5,) the same over the global batch
    lost: list[Record]  # responses without a usable answer of the teacher's
    void: bool = False  # nothing of it counts: this rank has no row in the last batch of an epoch


class DuDiTrainer(ContinuingTrainer):
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
        student = prepared_student(student, peft_config)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # the adapter's first weights are drawn
            student = get_peft_model(student, peft_config)
        teacher = self._load_teacher(teacher_model, args, tokenizer, student)
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
        self.quarantine = Quarantine()
        self.verbalizer = context_verbalizer(args, train_dataset)
        if teacher is not None:
            check_signals(student, teacher, self.bridge, args)
        body = getattr(teacher, "live", None) if self.known is not None else teacher
        for who, own in (("student", student), ("teacher", body)):
            if own is not None and args.padding_free:
                check_padding_free(own, who)
            if own is not None and args.compile_bodies:
                compile_body(own)
        self.meter = Meter()
        self.teaching = Teaching(
            self.bridge, self.verbalizer, args, tokenizer, self.meter, train_dataset
        )
        train_dataset = self._prepare(train_dataset, tokenizer, args, "train")
        eval_dataset = self._prepare(eval_dataset, tokenizer, args, "eval")
        if train_dataset is not None:
            check_positions(student, teacher, train_dataset, args)
        self._adapter = adapter_settings(causal_lm(student), student)
        self._whose = whose(teacher)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self._shard(student, teacher, args, optimizers)
        super().__init__(
            model=student,
            args=args,
            data_collator=DuDiCollator(tokenizer.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[MetricsFile(), self.quarantine, *(callbacks or [])],
            optimizers=optimizers,
        )
        if train_dataset is not None:
            self.quarantine.check_ranks(len(train_dataset))
        self.loss_is_scaled_for_ga = True  # our denominators are global already
        self.is_distributed_loading_by_transformers = self.sharded  # the model reduces gradients
        self.teacher = teacher
        if teacher is not None:
            self.teacher = self.accelerator.prepare_model(
                teacher,
                device_placement=False if is_sharded(teacher) or is_quantized(teacher) else None,
                evaluation_mode=True,
            )
        self.sampling = Sampling(args, tokenizer, self.meter, args.process_index)
        self.schedules = args.schedules
        scored = args.preference_weight > 0 and args.reference in ("initial", "lagged")
        self.reference = make_reference(self.model, args) if scored else None
        self.known_scores = KnownScores()

    # ---- construction --------------------------------------------------------------------------

    @staticmethod
    def _own_tokenizer(model: str | PreTrainedModel) -> PreTrainedTokenizerBase:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        if not name:
            raise ValueError("processing_class must be given: the model does not name a tokenizer")
        return load_tokenizer(name, "the tokenizer of model")

    @staticmethod
    def _load_teacher(teacher_model: Any, args: DuDiConfig, tokenizer: Any, student: Any) -> Any:
        if not args.needs_teacher:
            return None
        source = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        argument = "teacher_model" if teacher_model is not None else "teacher_model_name_or_path"

        def load() -> Any:
            return source and load_model(source, args.teacher_model_init_kwargs, argument)

        if args.teacher_cache is not None:
            return open_cache(args, load)
        if args.teacher_url is not None:
            return open_server(args, tokenizer, vocab_size(student))
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

    def _shard(self, student: Any, teacher: Any, args: DuDiConfig, optimizers: Any) -> None:
        mesh = make_mesh(args.fsdp_size, args.device)
        self.sharded = mesh is not None
        if mesh is None:
            return
        loading: Any = args.accelerator_config
        if not loading.even_batches:
            raise ValueError(
                "accelerator_config must leave even_batches true with fsdp_size: each process "
                "takes part in the forwards of all"
            )
        if any(optimizer is not None for optimizer in optimizers):
            raise ValueError(
                "optimizers must not be given with fsdp_size: one is made of the sharded weights"
            )
        if getattr(teacher, "live", None) is not None:
            raise ValueError(
                "fsdp_size can't be combined with a live teacher beside a teacher_cache, whose "
                "head both use: cache alone, or teach live"
            )
        shard(student, mesh, "student", args.bf16)
        if teacher is not None and self.known is None:  # of a known one there is a head at most
            shard(teacher, mesh, "teacher", args.bf16)

    def _prepare(self, dataset: Any, tokenizer: Any, args: DuDiConfig, split: str) -> Any:
        if dataset is None or "completion_ids" in dataset.column_names:
            return dataset
        bad: list[Record] = []
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
            quarantine=bad if args.skips_bad else None,
            split_name=split,
        )
        prepared, lost = answered_rows(self.known, prepared, args, self.bridge.pairing, split)
        self.quarantine.leave_out([*bad, *lost])
        counts |= {"rows": len(prepared), "bad_rows": counts["bad_rows"] + len(lost)}
        self.data_counts[split] = counts
        return prepared

    # ---- sampling and packing ------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one optimizer step, with y- drawn and all denominators known."""
        if 0 < self.state.max_steps <= self.state.global_step:  # a finished run is resumed
            self.control.should_training_stop = True
            return [], None
        if self.args.reference == "lagged" and self.reference is not None:
            step = self.state.global_step
            if step > 0 and step % self.args.reference_sync_steps == 0:
                self.reference.refresh(self.model)
        if not self.sampling.ahead:
            self._look_ahead(epoch_iterator, num_batches, device)
        batches, drawn = self.sampling.ahead.pop(0) if self.sampling.ahead else ([], [])
        micro = [self._micro_batch(batch, own) for batch, own in zip(batches, drawn, strict=True)]
        if not micro:
            return [], None
        self._step_rows = [row for m in micro for row in m.rows]
        totals = torch.stack([m.counts for m in micro]).sum(0)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(device), "sum").cpu()
        self._quarantine([record for m in micro for record in m.lost])
        for m in micro:
            m.totals = totals
        self._log_completions(micro[0])
        return [{"batch": m} for m in micro], int(totals[0])

    def _look_ahead(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> None:
        """Take the batches of the steps to come and draw for them; an epoch's end ends them."""
        step = self.state.global_step
        steps: list[list[Batch]] = []
        for _ in range(self.sampling.window(step, self.state.max_steps)):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not batches:
                break
            steps.append([{name: t.cpu() for name, t in batch.items()} for batch in batches])
            self._leave_out_repeats(steps[-1])
        model = self.accelerator.unwrap_model(self.model)
        finite = self.sampling.fill(model, steps, step, self._score)
        if self.args.needs_samples and steps:
            rows = [row for own in steps for batch in own for row in batch["row"].tolist()]
            what = "the student's logits are not finite in sampling"
            self._require_finite(finite, what, rows)

    def _leave_out_repeats(self, batches: list[Batch]) -> None:
        """Of the last batch of an epoch, which accelerate fills up with rows of the first, keep
        what one process would have read; a rank that has nothing of it keeps a row that is void."""
        ranks = self.accelerator.num_processes
        if ranks == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return
        each = self.args.per_device_train_batch_size
        left = len(self.train_dataset) % (each * ranks)
        own = left - each * self.accelerator.process_index
        if left and own < each:
            batches[-1] = {name: t[: max(own, 1)] for name, t in batches[-1].items()}
            batches[-1]["void"] = torch.tensor(own <= 0)

    def _micro_batch(self, batch: Batch, drawn: Drawn | None) -> MicroBatch:
        prompts, rows = unpad(batch, "prompt"), batch["row"].tolist()
        each = self.args.num_generations if drawn is not None else 1
        given = unpad(batch, "completion") if self.args.needs_given else [None] * len(prompts)
        samples = drawn.completions if drawn is not None else []
        listed = [
            (text, i, (1 + each) * i + k)
            for i in range(len(prompts))
            for k, text in enumerate([given[i], *samples[each * i : each * (i + 1)]])
            if text is not None
        ]
        texts, of_prompt, segments = (list(part) for part in zip(*listed, strict=True))
        packed = Responses(texts, of_prompt, segments, 1 + each)
        pad = self.processing_class.pad_token_id
        student = pack([prompts[i] for i in packed.prompts], packed.ids, pad, packed.segments)
        lesson: Lesson | None = None
        lost: list[Record] = []
        if self.teacher is not None:
            prompts_seen, plain = (unpad(batch, n) for n in ("teacher_prompt", "plain_prompt"))
            lesson = self.teaching.lesson(packed, rows, prompts_seen, plain, samples)
            if isinstance(self.known, KnownTop):
                lesson, lost = self._answered(self.known, lesson, rows)
        taught = torch.zeros(2) if lesson is None else lesson.taught(student.segment_ids)
        rows_given, rows_drawn = (
            sum(len(packed.ids[i]) for i in packed.sides([side])) for side in (0, 1)
        )
        counts = torch.tensor([rows_given, rows_drawn, len(prompts) * each, *taught])
        void = "void" in batch and bool(batch["void"])
        if void:
            counts = torch.zeros_like(counts)
        return MicroBatch(
            student=student,
            lesson=lesson,
            rows=rows,
            responses=packed,
            drawn=drawn,
            prompts=prompts,
            counts=counts,
            totals=counts,
            lost=lost,
            void=void,
        )

    def _answered(
        self, teacher: KnownTop, lesson: Lesson, rows: list[int]
    ) -> tuple[Lesson, list[Record]]:
        """With the teacher's answers; the responses without one, for `bad_rows.jsonl`."""
        step = self.state.global_step + 1
        try:
            lesson, lost = answered(teacher, lesson)
        except TeacherServerError as error:
            raise type(error)(
                f"step {step}, dataset rows {rows}: {error}. {self._last_good}"
            ) from error
        return lesson, [
            {
                "split": "train",
                "row": rows[segment // lesson.group],
                "step": step,
                "response": "sample" if segment % lesson.group else "given",
                "reason": reason,
            }
            for segment, reason in lost.items()
        ]

    def _quarantine(self, lost: list[Record]) -> None:
        """On every rank, what any of them lost in this step."""
        if isinstance(self.known, KnownTop) and self.args.skips_bad:
            self.quarantine.add(gather_object(lost), self.args)

    @torch.no_grad()
    def _score(self, batch: Batch, drawn: Drawn) -> Tensor:
        """(R,) log-probabilities of samples under the student as it is."""
        each = self.args.num_generations
        prompts = [p for p in unpad(batch, "prompt") for _ in range(each)]
        module = self.accelerator.unwrap_model(self.model)
        packed = pack(prompts, drawn.completions, self.processing_class.pad_token_id)
        packed = packed.to(self.accelerator.device)

        def score() -> Tensor:
            hidden = response_hidden(module, packed, self.args.padding_free)
            return self._log_probs(module, hidden, packed.targets).cpu()

        with self.accelerator.autocast():
            return run_inside(module, score)

    def _log_probs(self, module: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        budget = self.args.memory_budget
        return linear_log_prob(hidden, lm_head(module), targets, memory_budget=budget)

    def greedy_sample(self, prompt: Tensor) -> Rollout:
        """What the student would write without chance."""
        return self.sampling.greedy(self.accelerator.unwrap_model(self.model), prompt)

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
        self.meter.counting = not batch.void
        device = self.accelerator.device
        student = batch.student.to(device)
        with self.accelerator.autocast():
            taught = self._taught(batch, len(student.targets), device)
            reference = self._reference_log_prob(batch)
            module = self.accelerator.unwrap_model(model)

            def forward() -> Any:
                return self._signals(module, student, taught, reference, batch)

            with redirected_forward(module, forward):
                output = model()
        finite = bool(torch.isfinite(output.loss))
        self._require_finite(finite, f"the loss is {output.loss.item()}", batch.rows)
        self._record(output, student, batch)
        # DDP and FSDP average over ranks; a void batch has gradients too, and they are 0
        loss = output.loss * (0 if batch.void else self.accelerator.num_processes)
        return (loss, output) if return_outputs else loss

    def _taught(self, batch: MicroBatch, rows: int, device: torch.device) -> Taught | None:
        """What the teacher says; its head stays whole until `training_step` ends."""
        lesson = batch.lesson
        if lesson is None:
            return None
        teacher = self.accelerator.unwrap_model(self.teacher)
        return run_inside(
            teacher, lambda: self.teaching.teach(teacher, lesson, rows, device), keep=True
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        release(self.teacher)
        return loss

    @torch.no_grad()
    def _reference_log_prob(self, batch: MicroBatch) -> Tensor | str | None:
        """(S,) log-probabilities of each response under the reference policy. Those of y+ are made
        once where it never changes."""
        if self.args.preference_weight == 0 or self.args.reference == "none":
            return None
        if self.reference is None:
            return "teacher"
        r, known = batch.responses, self.known_scores.by_row
        given = {i: batch.rows[r.prompts[i]] for i in r.sides([0])}  # which row of the data
        wanted = [i for i in range(len(r.ids)) if given.get(i) not in known]
        if self.sharded:  # the ranks take part in each other's forwards
            wanted = list(range(len(r.ids))) if self.any_rank(bool(wanted)) else []
        found = torch.tensor([known.get(given.get(i, -1), 0.0) for i in range(len(r.ids))])
        if wanted:
            found[wanted] = self._under_reference(batch, wanted).cpu()
        if self.args.reference == "initial":
            known.update({given[i]: float(found[i]) for i in wanted if i in given})
        return found.to(self.accelerator.device)

    def _under_reference(self, batch: MicroBatch, wanted: list[int]) -> Tensor:
        r, pad = batch.responses, self.processing_class.pad_token_id
        prompts = [batch.prompts[r.prompts[i]] for i in wanted]
        packed = pack(prompts, [r.ids[i] for i in wanted], pad).to(self.accelerator.device)
        module = self.accelerator.unwrap_model(self.model)
        assert self.reference is not None

        def score() -> Tensor:
            return sequence_log_prob(
                response_hidden(module, packed, self.args.padding_free),
                lm_head(module),
                packed.targets,
                packed.segment_ids,
                memory_budget=self.args.memory_budget,
            )

        with self.reference.applied(module):
            return run_inside(module, score)

    def _signals(
        self,
        module: nn.Module,
        packed: Packed,
        taught: Taught | None,
        reference: Tensor | str | None,
        batch: MicroBatch,
    ) -> Any:
        a = self.args
        off_rows, on_rows, pairs, _, on_taught = batch.totals.tolist()
        hidden = response_hidden(module, packed, self.args.padding_free)
        weight = None
        if taught is not None:
            weight = self._divergence_weight(module, hidden, packed, taught, batch)
            weight = _row_weight(
                weight, packed.segment_ids % batch.responses.group == 0, batch.totals
            )
        return linear_dudi_loss(
            hidden,
            lm_head(module),
            None if taught is None else taught.hidden,
            None if taught is None else taught.head,
            packed.targets,
            packed.segment_ids,
            preference_loss=a.preference_loss,
            preference_beta=a.preference_beta,
            preference_margin=a.preference_margin,
            preference_length_power=a.preference_length_power,
            reference_log_prob=reference,
            off_policy_rows=off_rows,
            on_policy_rows=on_rows if taught is None else max(on_taught, 1),
            pairs=pairs,
            num_generations=batch.responses.group - 1,
            divergence_weight=weight,
            verbalizer=self.teaching.map_on(packed.targets.device),
            **signal_options(a) | self.weights(),
        )

    def _divergence_weight(
        self, module: nn.Module, hidden: Tensor, packed: Packed, taught: Taught, batch: MicroBatch
    ) -> Tensor | None:
        """(N,) of what the teacher says, and of samples that an older policy drew; None: ones."""
        d = batch.drawn
        if d is None or d.log_prob is None or d.step == self.state.global_step:
            return taught.weight
        drawn = packed.segment_ids % batch.responses.group > 0
        now = self._log_probs(module, hidden.detach()[drawn], packed.targets[drawn])
        ratio = (now.detach() - d.log_prob.to(now)).clamp(max=0).exp()
        self.meter.add("rollout_importance", ratio.sum(), len(ratio))
        weight = torch.ones(len(hidden), device=hidden.device)
        weight[drawn] = ratio
        return weight if taught.weight is None else weight * taught.weight

    def weights(self) -> dict[str, Any]:
        """Of the signals, in this step."""
        step, most = self.state.global_step, self.state.max_steps
        found = {name: getattr(self.args, name) for name in WEIGHTS}
        for name, schedule in self.schedules.items():
            found[name] *= schedule.factor(step, most)
        return found

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
        self.meter.counting = True
        for name, (weight, value) in parts.items():
            if weight > 0:  # parts sum over micro-batches and ranks
                add(name, 0.0 if batch.void else value, share)
        self.meter.counting = not batch.void
        add("entropy", output.entropy.sum(), len(output.entropy))
        if batch.lesson is not None:
            self.teaching.record(output.teacher_entropy, batch.lesson, packed)
        if a.gradient_tolerance > 0:
            add("skipped_logits", output.skipped * len(output.entropy), len(output.entropy))
        self._count_tokens(0 if batch.void else batch.student.num_tokens)
        group = batch.responses.group
        by_prompt = output.log_probs.view(-1, group)
        chosen, rejected = by_prompt[:, 0], by_prompt[:, 1:]
        if self.args.needs_given:
            add("logps/chosen", chosen.sum(), chosen.numel())
        if batch.drawn is not None:
            add("logps/rejected", rejected.sum(), rejected.numel())
            if a.reuses_policies:
                age = self.state.global_step - batch.drawn.step
                add("rollout_staleness", age * rejected.numel(), rejected.numel())
        for name, weight in self.weights().items():
            if name in self.schedules:
                add(f"weights/{name}", weight, 1)
        if a.preference_weight > 0:
            lengths = torch.bincount(packed.segment_ids, minlength=by_prompt.numel()).clamp(min=1)
            gain = (output.log_probs - output.reference_log_probs) * a.preference_beta
            rewards = (gain / lengths**a.preference_length_power).view(-1, group)
            margins = rewards[:, :1] - rewards[:, 1:]
            add("rewards/chosen", rewards[:, 0].sum(), len(rewards))
            add("rewards/rejected", rewards[:, 1:].sum(), margins.numel())
            add("rewards/margins", margins.sum(), margins.numel())
            add("rewards/accuracies", (margins > 0).float().sum(), margins.numel())
        self.meter.counting = True

    def _count_tokens(self, count: int) -> None:
        tokens = torch.tensor(count)
        if self.accelerator.num_processes > 1:
            tokens = self.accelerator.reduce(tokens.to(self.args.device), "sum")
        self.state.num_input_tokens_seen += int(tokens)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x parameters x tokens of the student's forward and backward."""
        batch: MicroBatch = inputs["batch"]
        return 6 * sum(p.numel() for p in self.model.parameters()) * batch.student.num_tokens

    def _log_completions(self, batch: MicroBatch) -> None:
        a = self.args
        due = (self.state.global_step + 1) % max(1, int(a.logging_steps)) == 0
        if not (a.log_completions and due and batch.drawn and self.is_world_process_zero()):
            return
        from rich.console import Console
        from rich.table import Table

        decode = self.processing_class.decode
        table = Table("prompt", "completion", "end", title=f"step {self.state.global_step + 1}")
        each = len(batch.drawn.completions) // len(batch.prompts)
        prompts = [p for p in batch.prompts for _ in range(each)]
        shown = zip(prompts, batch.drawn.completions, batch.drawn.finish_reasons, strict=True)
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
            padding_free=self.args.padding_free,
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


def _languages(dataset: Any) -> list[str] | None:
    """Codes that the data has, or None where it does not say."""
    if dataset is None or "language" not in dataset.column_names:
        return None
    return sorted({code for code in dataset.unique("language") if code})


def _row_weight(weight: Tensor | None, positive: Tensor, totals: Tensor) -> Tensor | None:
    """(N,) of each row's divergence: its mean over y+ is over the rows that are taught anywhere in
    the global batch, but its denominator is that of cross-entropy, which is over all of them."""
    rows, _, _, taught, _ = totals.tolist()
    scale = rows / max(taught, 1)
    if scale == 1 or not rows:
        return weight
    if weight is None:
        weight = torch.ones(len(positive), device=positive.device)
    return torch.where(positive, weight * scale, weight)
