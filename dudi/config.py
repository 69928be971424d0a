"""What a run is made of: DuDiConfig (the trainer's) and ScriptArguments (models and data).

Both are dataclasses; `parse` reads them from one YAML file with `--name value` overrides. Every
mistake that can be seen here is an error here, before a model is loaded or a folder made: unknown
keys (with the nearest valid one), wrong types, values out of range, options that can't be honoured.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from dudi.schedules import Schedule
from dudi_kernels import DIVERGENCES
from dudi_kernels.preference import PREFERENCES
from dudi_kernels.verbalizer import UNMATCHED

BEST_METRICS = ("loss", "nll_per_char", "nll_per_token", "kl_to_teacher")
REFERENCES = ("initial", "lagged", "teacher", "none")
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
REFERENCE_DTYPES = ("float32", "bfloat16", "float16")
# Of transformers.GenerationConfig, what may be set beside the options of our own.
GENERATION_OPTIONS = (
    "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "suppress_tokens",
    "begin_suppress_tokens", "renormalize_logits", "cache_implementation",
)  # fmt: skip
# Those that need no more than a token's logits: what a paged cache gives them.
PAGED_OPTIONS = (
    "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "suppress_tokens",
    "renormalize_logits",
)  # fmt: skip
ROLLOUT_CACHES = ("dynamic", "static", "paged")
# Of these, what vLLM has too.
VLLM_GENERATION_OPTIONS = ("min_p", "repetition_penalty", "min_new_tokens")
VLLM_COLDEST = 0.01  # it takes lower temperatures for this one
VLLM_OWN = ("model", "tokenizer", "skip_tokenizer_init")  # arguments of LLM that the run gives
ROLLOUT_BACKENDS = ("transformers", "vllm")
VLLM_MODES = ("server", "colocate")
OVERLONG = ("truncate", "drop")
BAD_ROWS = ("error", "skip")
LEXICON_KINDS = ("lexicon", "concepts")
COUNTS = (
    "reference_sync_steps", "max_prompt_length", "max_completion_length",
    "max_teacher_prompt_length", "memory_budget", "served_top_k", "served_concurrency",
    "num_generations", "rollout_steps",
    "rollout_batch_size", "vllm_sync_steps", "vllm_concurrency",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "save_total_limit",
)  # fmt: skip
NOT_NEGATIVE = (
    "learning_rate", "num_completions_to_print", "weight_decay", "max_grad_norm", "warmup_steps",
    "dataloader_num_workers", "teacher_skip_tokens", "confidence_gating", "served_retries",
    "vllm_retries", "vllm_tolerance",
)  # fmt: skip
# Each weight's state is of its shape, or one number: it can be put together and cut again.
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
WEIGHTS = ("off_policy_weight", "on_policy_weight", "preference_weight", "ce_weight")


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def field_types(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass that can be constructed with it."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def coerced(name: str, value: Any, wanted: Any) -> Any:
    """`value` as the type that field `name` wants; numbers may come as text."""
    members = _members(wanted)
    if isinstance(value, bool) and bool not in members and (members & {int, float, str}):
        if name == "fsdp":  # transformers takes True there, whatever its annotation says
            return value
        raise TypeError(f"{name} must be {_spelt(wanted)}, got {value!r}")
    if isinstance(value, enum.Enum) or (value is None and types.NoneType in members):
        return value
    for choices in members:  # steps, cosine, adamw_torch and the like
        if isinstance(choices, type) and issubclass(choices, enum.Enum) and isinstance(value, str):
            _one_of(name, value, [choice.value for choice in choices])
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        kind = type(value).__name__
        raise TypeError(f"{name} must be {_spelt(wanted)}, got {value!r} ({kind})") from error


def _members(wanted: Any) -> set[Any]:
    return set(typing.get_args(wanted)) or {wanted}


def _spelt(wanted: Any) -> str:
    if isinstance(wanted, type) and not typing.get_args(wanted):
        return wanted.__name__
    return str(wanted).replace("typing.", "").replace("NoneType", "None")


@dataclass
class DuDiConfig(TrainingArguments):
    """Configuration of `DuDiTrainer`: transformers' `TrainingArguments` and the fields below.

    A signal's weight of 0 switches the signal off and its cost: no samples are drawn where neither
    the on-policy nor the preference signal is on, and no teacher is loaded where nothing needs one.
    """

    # inherited, with other defaults
    learning_rate: float = _field(1e-5, "Peak learning rate of the optimizer.")
    logging_steps: float = _field(10, "Log every so many optimizer steps.")
    remove_unused_columns: bool = _field(False, "Must stay False: the columns are prepared here.")
    logging_nan_inf_filter: bool = _field(False, "A non-finite loss stops the run instead.")
    report_to: str | list[str] | None = _field("tensorboard", "Where metrics go beside the file.")

    # models
    model_init_kwargs: dict[str, Any] | None = _field(
        None, "Keyword arguments of from_pretrained for the student (dtype: float32 by default)."
    )
    teacher_model_name_or_path: str | None = _field(None, "The teacher, where none is passed.")
    teacher_model_init_kwargs: dict[str, Any] | None = _field(
        None, "Keyword arguments of from_pretrained for the teacher."
    )
    teacher_tokenizer_name_or_path: str | None = _field(
        None, "By default the teacher's own; where it has none, the student's."
    )
    teacher_cache: str | None = _field(
        None,
        "A folder that `dudi cache-teacher` has written: the teacher of y+, without its body.",
    )
    teacher_url: str | None = _field(
        None,
        "A completions endpoint that serves the teacher, such as vLLM's http://localhost:8000: its "
        "likeliest tokens are asked for in each step.",
    )
    served_model: str | None = _field(None, "Its name there; by default the first one served.")
    served_top_k: int = _field(20, "How many tokens; vLLM gives --max-logprobs of them at most.")
    served_timeout: float = _field(60.0, "Seconds that a request may take.")
    served_retries: int = _field(5, "Tries more, where a server fails in passing.")
    served_concurrency: int = _field(8, "Requests at a time.")
    disable_dropout: bool = _field(True, "Set every dropout of the student to 0.")

    # signals
    off_policy_weight: float = _field(1.0, "Weight of the divergence on given responses y+.")
    on_policy_weight: float = _field(1.0, "Weight of the divergence on the student's samples y-.")
    preference_weight: float = _field(0.1, "Weight of the sequence-level preference of y+ over y-.")
    ce_weight: float = _field(0.0, "Weight of plain cross-entropy on y+.")
    off_policy_divergence: str | None = _field(
        None, f"One of {', '.join(DIVERGENCES)}; by default what beta says, else forward_kl."
    )
    on_policy_divergence: str | None = _field(
        None, "The same for the samples; by default what beta says, else forward_kl."
    )
    beta: float | None = _field(
        None,
        "As in TRL's GKD: 0 is forward KL, 1 is reverse KL, between is generalised JSD. Sets the "
        "divergences that are not named; the share of the teacher in a named jsd (0.5 by default).",
    )
    alpha: float = _field(0.1, "Skew of skew_forward_kl and skew_reverse_kl, in (0, 1).")
    temperature: float = _field(1.0, "Temperature of both distributions in the divergences.")
    preference_loss: str = _field(
        "sigmoid", f"What a pair's difference of scores costs: {', '.join(PREFERENCES)}."
    )
    preference_beta: float = _field(0.1, "Factor on the difference of scores in the preference.")
    preference_margin: float = _field(
        0.0, "How far y+ shall be ahead, after that factor; with reference: none above all."
    )
    preference_length_power: int = _field(
        0, "The a in r(y) = (log pi - log pi_ref) / |y|^a: 0 sums, 1 averages over tokens."
    )
    reference: str = _field(
        "initial",
        "Reference policy of the preference: initial (the start), lagged (a snapshot, refreshed "
        "every reference_sync_steps), teacher, none.",
    )
    reference_sync_steps: int = _field(100, "Optimizer steps between refreshes of lagged.")
    reference_dtype: str | None = _field(
        None, f"What a copy is kept in: {', '.join(REFERENCE_DTYPES)}; by default the student's."
    )
    reference_on_cpu: bool = _field(False, "Keep a copy in the CPU's memory between its uses.")
    weight_schedules: dict[str, dict[str, Any]] | None = _field(
        None,
        "How weights change: {on_policy_weight: {kind: warmup, steps: 200}}; kinds are constant, "
        "linear (to a factor of `end`) and warmup, over `steps` or the whole run.",
    )

    # samples
    num_generations: int = _field(1, "Samples of each prompt, each a pair with y+.")
    rollout_steps: int = _field(
        1, "Draw samples for so many optimizer steps at once, by the policy of the first of them."
    )
    rollout_importance: bool = _field(
        False,
        "Weigh the divergence of each row of a sample that an older policy drew by min(1, p / "
        "p_then) of its token.",
    )
    rollout_batch_size: int | None = _field(
        None, "Sequences that are drawn together; by default those of a micro-batch."
    )
    rollout_cache: str = _field(
        "dynamic",
        "Where keys and values lie in sampling: dynamic (it grows), static (its full length from "
        "the start: compiled on a GPU), paged (continuous batching: whoever ends makes room for "
        "the next; rollout_batch_size is how many are under way together).",
    )
    rollout_temperature: float = _field(1.0, "Temperature the samples y- are drawn at.")
    top_p: float = _field(1.0, "Nucleus sampling: smallest set of tokens of this mass, in (0, 1].")
    top_k: int = _field(0, "Sample among the k likeliest tokens; 0 is all of them.")
    stop_strings: list[str] | None = _field(None, "A sample ends with the first of them, too.")
    generation_kwargs: dict[str, Any] | None = _field(
        None, "More of transformers.GenerationConfig: min_p, repetition_penalty and the like."
    )
    rollout_backend: str = _field(
        "transformers", "What draws them: transformers' generate, or vllm."
    )
    vllm_mode: str = _field(
        "server",
        "server: a `vllm serve` at vllm_url; colocate: an engine in this process (one process).",
    )
    vllm_url: str | None = _field(
        None, "Of a server that was started with VLLM_SERVER_DEV_MODE=1, which lets weights in."
    )
    vllm_engine_kwargs: dict[str, Any] | None = _field(
        None, "Arguments of vLLM's LLM with colocate: gpu_memory_utilization, dtype and the like."
    )
    vllm_sync_steps: int = _field(
        1, "Send weights before a draw if so many optimizer steps were taken since the last time."
    )
    vllm_sync_dir: str | None = _field(
        None,
        "Where weights are left for vLLM, a folder that both see; by default /dev/shm if it has "
        "room, else output_dir.",
    )
    vllm_tolerance: float = _field(
        0.05,
        "Mean difference between vLLM's and the student's log-probability of a token, in nats, "
        "above which the run stops.",
    )
    vllm_timeout: float = _field(600.0, "Seconds that a request to vLLM may take.")
    vllm_retries: int = _field(5, "Tries more, where it fails in passing.")
    vllm_concurrency: int = _field(64, "Requests at a time, of each process.")
    log_completions: bool = _field(False, "Print samples at each log event.")
    num_completions_to_print: int = _field(4, "How many of them.")

    # several processes
    fsdp_size: int | Literal["auto"] | None = _field(
        None,
        "Shard weights, gradients and optimizer states of the student, and the teacher, over so "
        "many processes (FSDP2); auto: all of them. By default each process holds all (DDP).",
    )

    # bodies
    padding_free: bool = _field(
        False,
        "Bodies read a micro-batch's sequences one after another, without padding (attention: "
        "flash_attention_2, or sdpa where sequences are short).",
    )
    compile_bodies: bool = _field(
        False, "torch.compile of the bodies in training; sampling and evaluation stay as they are."
    )

    # data
    max_prompt_length: int | None = _field(512, "Tokens of a prompt at most; None is no limit.")
    max_completion_length: int | None = _field(256, "Tokens of y+ and y- at most.")
    max_teacher_prompt_length: int | None = _field(
        1024, "Tokens of what the teacher reads before a response, at most."
    )
    overlong: str = _field(
        "truncate", "What happens to longer rows: truncate (prompts lose their middle) or drop."
    )
    bad_rows: str = _field(
        "error",
        "What happens to rows that can't be read or tokenized, or whose teacher's answer is "
        "damaged in a cache or rubbish from a server: error, or skip (bad_rows.jsonl lists them).",
    )
    chat_template_kwargs: dict[str, Any] | None = _field(
        None, "Switches of both chat templates, such as {enable_thinking: false}."
    )

    # context verbalizer
    context_verbalizer: bool | None = _field(
        None,
        "Whether the teacher reads the context verbalizer's prompt. None: where the data has a "
        "language and any of pivot_prompt, pivot_completion, privileged_context.",
    )
    verbalizer_templates: dict[str, str] | None = _field(
        None, "jinja2 templates by language code, in place of the built-in ones."
    )
    verbalizer_chain: list[dict[str, str]] | None = _field(
        None,
        "Turns in place of the last user turn, each {role: template}; `template` stands for the "
        "language's template, which is the only turn by default.",
    )

    # refinement of what the teacher says
    teacher_skip_tokens: int = _field(
        0, "Leave the divergence of the first tokens of each response out."
    )
    teacher_temperature: float | None = _field(
        None, "Temperature of the teacher's side of the divergences; by default `temperature`."
    )
    teacher_top_p: float = _field(
        1.0, "Restrict the teacher to its likeliest tokens of this mass, in (0, 1]."
    )
    verbalized_share: float = _field(
        1.0,
        "Share w of the verbalized teacher beside the plain one, which reads the student's prompt: "
        "log p = w log p_verbalized + (1 - w) log p_plain + constant.",
    )
    confidence_gating: float = _field(
        0.0,
        "The power g in min(1, p_verbalized(y) / p_plain(y))^g, which weighs the rows of y+ in the "
        "divergence; 0 is off.",
    )

    # vocabulary verbalizer
    vocabulary_verbalizer: bool | str | None = _field(
        None,
        "A map from the teacher's vocabulary to the student's, as Verbalizer.save writes it. None: "
        "made where tokenizers or sizes of heads differ; false: those are refused.",
    )
    verbalizer_cache_dir: str | None = _field(
        "~/.cache/dudi", "Keeps the maps between tokenizers; null keeps none."
    )
    unmatched: str = _field(
        "bucket",
        "What becomes of mass without a partner in the other vocabulary: bucket (one class for all "
        "of it) or renormalize.",
    )
    lexicon: str | None = _field(
        None, "A TSV file of pivot word, target word, language: what means the same."
    )
    lexicon_kind: str = _field(
        "lexicon",
        "lexicon: a pivot word gives lexicon_share of its mass to its translations; concepts: the "
        "words of one meaning are one class.",
    )
    lexicon_share: float = _field(0.5, "What a pivot word gives, in (0, 1].")
    max_unpaired: float = _field(
        0.1, "Share of responses whose bytes a normalizing teacher tokenizer may change."
    )

    memory_budget: int = _field(256 * 2**20, "Bytes of workspace for the fused loss.")
    gradient_tolerance: float = _field(
        0.0,
        "Leave tiles of next to no probability out of the gradient of the logits, whose L1 norm "
        "then loses at most this share; 0 is exact.",
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> DuDiConfig:
        known = field_types(cls)
        for name in kwargs:
            if name not in known:
                raise TypeError(f"unknown config key {name!r}{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        own = DuDiConfig.__annotations__
        wanted = field_types(type(self))
        for name in own:
            setattr(self, name, coerced(name, getattr(self, name), wanted[name]))
        self._check_ranges()
        self._check_signals()
        self._check_unsupported()
        self._check_sharding()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _accelerated():
            self.use_cpu = True  # else each of the processes would train by itself
        self._check_vllm()
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU: its gradients need scaling; on a CPU use bf16")

    # ---- what follows from the fields ----------------------------------------------------------

    @property
    def needs_samples(self) -> bool:
        return self.on_policy_weight > 0 or self.preference_weight > 0

    @property
    def needs_teacher(self) -> bool:
        scored = self.preference_weight > 0 and self.reference == "teacher"
        return self.off_policy_weight > 0 or self.on_policy_weight > 0 or scored

    @property
    def skips_bad(self) -> bool:
        return self.bad_rows == "skip"

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What GEMMs are rounded to; None: the weights' own."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def weighs_rollouts(self) -> bool:
        """Whether log-probabilities are kept of the policy that drew a sample."""
        return self.rollout_importance and self.reuses_policies and self.on_policy_weight > 0

    @property
    def reuses_policies(self) -> bool:
        """Whether a step may train on samples that an older policy drew."""
        return self.rollout_steps > 1 or (
            self.rollout_backend == "vllm" and self.vllm_sync_steps > 1
        )

    @property
    def schedules(self) -> dict[str, Schedule]:
        """By the name of the weight."""
        given = self.weight_schedules or {}
        return {name: Schedule.of(name, schedule) for name, schedule in given.items()}

    @property
    def needs_given(self) -> bool:
        """Whether any signal reads the given responses y+."""
        return self.off_policy_weight > 0 or self.ce_weight > 0 or self.preference_weight > 0

    @property
    def needs_plain_teacher(self) -> bool:
        """Whether the teacher also reads the student's own prompt."""
        return self.verbalized_share < 1 or (
            self.confidence_gating > 0 and self.off_policy_weight > 0
        )

    @property
    def plain_sides(self) -> tuple[int, ...]:
        """Of which it does: y- are not gated, only mixed."""
        return (0, 1) if self.verbalized_share < 1 else (0,)

    @property
    def taught_sides(self) -> tuple[int, ...]:
        """Which of y+ (0) and y- (1) the teacher has to score; the other costs it nothing."""
        if self.preference_weight > 0 and self.reference == "teacher":
            return (0, 1)
        weights = (self.off_policy_weight, self.on_policy_weight)
        return tuple(side for side in (0, 1) if weights[side] > 0)

    @property
    def kd_divergences(self) -> tuple[str, str, float]:
        """Names of the off- and on-policy divergences and the beta of a jsd."""
        off = self.off_policy_divergence or self._from_beta("forward_kl")
        on = self.on_policy_divergence or self._from_beta("forward_kl")
        return off, on, 0.5 if self.beta is None else self.beta

    def _from_beta(self, default: str) -> str:
        if self.beta is None:
            return default
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd")

    # ---- checks --------------------------------------------------------------------------------

    def _check_ranges(self) -> None:
        for name in field_types(type(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in (*WEIGHTS, *NOT_NEGATIVE):
            _between(name, getattr(self, name) or 0, 0, math.inf)
        for name in ("logging_steps", "save_steps", "num_train_epochs"):
            _between(name, getattr(self, name), 0, math.inf, low_open=True)
        if self.max_steps != -1:
            _between("max_steps", self.max_steps, 1, math.inf)
        for name in (
            "temperature",
            "rollout_temperature",
            "preference_beta",
            "served_timeout",
            "vllm_timeout",
        ):
            _between(name, getattr(self, name), 0, math.inf, low_open=True)
        if self.teacher_temperature is not None:
            _between("teacher_temperature", self.teacher_temperature, 0, math.inf, low_open=True)
        for name in ("gradient_tolerance", "verbalized_share", "max_unpaired"):
            _between(name, getattr(self, name), 0, 1)
        for name in ("top_p", "teacher_top_p", "lexicon_share"):
            _between(name, getattr(self, name), 0, 1, low_open=True)
        _between("top_k", self.top_k, 0, math.inf)
        for name in COUNTS:
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), 1, math.inf)
        if self.preference_length_power not in (0, 1):
            raise ValueError(
                f"preference_length_power must be 0 or 1, got {self.preference_length_power}"
            )
        _one_of("reference", self.reference, REFERENCES)
        _one_of("preference_loss", self.preference_loss, PREFERENCES)
        if self.reference_dtype is not None:
            _one_of("reference_dtype", self.reference_dtype, REFERENCE_DTYPES)
        for option in self.generation_kwargs or {}:
            _one_of("generation_kwargs", option, GENERATION_OPTIONS)
        self._check_rollout_cache()
        if self.stop_strings is not None and not all(self.stop_strings):
            raise ValueError(f"stop_strings must not be empty, got {self.stop_strings!r}")
        _one_of("overlong", self.overlong, OVERLONG)
        _one_of("bad_rows", self.bad_rows, BAD_ROWS)
        _one_of("unmatched", self.unmatched, UNMATCHED)
        _one_of("lexicon_kind", self.lexicon_kind, LEXICON_KINDS)
        for name in ("off_policy_divergence", "on_policy_divergence"):
            if getattr(self, name) is not None:
                _one_of(name, getattr(self, name), DIVERGENCES)

    def _check_rollout_cache(self) -> None:
        _one_of("rollout_cache", self.rollout_cache, ROLLOUT_CACHES)
        given = self.generation_kwargs or {}
        if self.rollout_cache != "dynamic" and "cache_implementation" in given:
            raise ValueError(
                "generation_kwargs must not have cache_implementation with rollout_cache="
                f"{self.rollout_cache!r}: give one of them"
            )
        for option in given:
            if self.rollout_cache == "paged" and option not in PAGED_OPTIONS:
                raise ValueError(
                    f"generation_kwargs must not have {option} with rollout_cache='paged', which "
                    f"takes {', '.join(PAGED_OPTIONS)}: others need what was written before"
                )

    def _check_signals(self) -> None:
        if not any(getattr(self, name) > 0 for name in WEIGHTS):
            raise ValueError(f"all signals are off: one of {', '.join(WEIGHTS)} must be positive")
        if self.beta is not None:
            _between("beta", self.beta, 0, 1)
        off, on, beta = self.kd_divergences
        if "jsd" in (off, on) and not 0 < beta < 1:
            raise ValueError(f"beta must be strictly between 0 and 1 with jsd, got {beta}")
        if any(name.startswith("skew") for name in (off, on)) and not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be strictly between 0 and 1, got {self.alpha}")
        if self.teacher_top_p < 1 and self.preference_weight > 0 and self.reference == "teacher":
            raise ValueError(
                f"teacher_top_p must be 1 with reference='teacher', got {self.teacher_top_p}: a "
                "teacher that is cut short has no probability for some responses"
            )
        for name in self.schedules:
            _one_of("weight_schedules", name, WEIGHTS)
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive where it has a schedule, got 0")
        longest = self.max_completion_length
        if longest is not None and self.teacher_skip_tokens >= longest:
            raise ValueError(
                f"teacher_skip_tokens must be less than max_completion_length={longest}, got "
                f"{self.teacher_skip_tokens}: the teacher would say nothing"
            )
        if self.needs_samples and self.max_completion_length is None:
            raise ValueError("max_completion_length must be a number where samples are drawn")

    def _keep_the_loss(self) -> None:
        """Liger's kernels for models, but never its losses."""
        if not self.use_liger_kernel:
            return
        kernels = dict(self.liger_kernel_config or {})
        for name in LIGER_LOSSES:
            if kernels.setdefault(name, False):
                raise ValueError(
                    f"{name} of liger_kernel_config must be False: the loss is dudi_kernels'"
                )
        self.liger_kernel_config = kernels

    def _check_unsupported(self) -> None:
        """Options of TrainingArguments that this trainer can't honour."""
        if self.teacher_cache is not None and self.teacher_url is not None:
            raise ValueError("teacher_cache and teacher_url exclude each other: give one of them")
        wanted: dict[str, Any] = {
            "remove_unused_columns": False,
            "label_smoothing_factor": 0.0,
            "neftune_noise_alpha": None,
        }
        for name, value in wanted.items():
            given = getattr(self, name)
            if given not in (value, None):
                raise ValueError(f"{name} must be {value}: DuDiTrainer can't honour {given!r}")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError("torch_compile must be False: it is compile_bodies here")
        self._keep_the_loss()
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "resume_from_checkpoint is not read from the configuration: pass --resume, or "
                "train(resume_from_checkpoint=...)"
            )
        metric = (self.metric_for_best_model or "eval_loss").removeprefix("eval_")
        if metric not in BEST_METRICS and not metric.endswith("_nll_per_char"):
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(BEST_METRICS)} or a language's "
                f"xx_nll_per_char, got {self.metric_for_best_model!r}"
            )
        for engine, chosen in (("DeepSpeed", self.deepspeed), ("FSDP", self.fsdp)):
            if chosen or _launched_with(engine.upper()):
                raise ValueError(
                    f"{engine} is not supported through accelerate, which knows of the student "
                    "alone: fsdp_size=auto (with torchrun) shards student and teacher"
                )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "train_sampling_strategy must be random or sequential, got "
                f"{self.train_sampling_strategy!r}"
            )

    def _check_sharding(self) -> None:
        if self.fsdp_size is None:
            return
        if self.fsdp_size != "auto":
            _between("fsdp_size", self.fsdp_size, 2, math.inf)
        if self.fp16:
            raise ValueError("fp16 must be false with fsdp_size: use bf16")
        optimizer = getattr(self.optim, "value", self.optim)
        if optimizer not in SHARDED_OPTIMIZERS:
            raise ValueError(
                f"optim must be one of {', '.join(SHARDED_OPTIMIZERS)} with fsdp_size, got "
                f"{optimizer!r}"
            )

    def _check_vllm(self) -> None:
        _one_of("rollout_backend", self.rollout_backend, ROLLOUT_BACKENDS)
        _one_of("vllm_mode", self.vllm_mode, VLLM_MODES)
        wanted = self.rollout_backend == "vllm" and self.vllm_mode == "server"
        if (self.vllm_url is not None) != wanted:
            raise ValueError(
                f"vllm_url must {'' if wanted else 'not '}be given with rollout_backend="
                f"{self.rollout_backend!r} and vllm_mode={self.vllm_mode!r}, got {self.vllm_url!r}"
            )
        if self.rollout_backend != "vllm":
            return
        if self.rollout_cache != "dynamic":
            raise ValueError(
                "rollout_cache is transformers' and must be left as it is with "
                f"rollout_backend='vllm', got {self.rollout_cache!r}"
            )
        for option in self.generation_kwargs or {}:
            if option not in VLLM_GENERATION_OPTIONS:
                raise ValueError(
                    f"generation_kwargs must be among {', '.join(VLLM_GENERATION_OPTIONS)} with "
                    f"rollout_backend='vllm', got {option!r}"
                )
        least, most = (
            (self.generation_kwargs or {}).get("min_new_tokens"),
            self.max_completion_length,
        )
        if least is not None and most is not None and least > most:
            raise ValueError(
                "min_new_tokens of generation_kwargs must be at most max_completion_length="
                f"{most}, got {least}"
            )
        if self.rollout_temperature < VLLM_COLDEST:
            raise ValueError(
                f"rollout_temperature must be at least {VLLM_COLDEST} with rollout_backend='vllm', "
                f"which would take {self.rollout_temperature} for that"
            )
        if self.rollout_batch_size is not None:
            raise ValueError(
                "rollout_batch_size must not be given with rollout_backend='vllm', which batches "
                f"by itself, got {self.rollout_batch_size}"
            )
        for name in VLLM_OWN:
            if name in (self.vllm_engine_kwargs or {}):
                raise ValueError(f"vllm_engine_kwargs must leave {name} to the run")


def _launched_with(engine: str) -> bool:
    """Whether `accelerate launch` chose this engine."""
    chosen = os.environ.get(f"ACCELERATE_USE_{engine}", "false")
    return chosen.lower() in ("1", "t", "true", "y", "yes", "on")


def _between(name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    if not math.isfinite(value) or value < low or value > high or (low_open and value == low):
        bound = f"in {'(' if low_open else '['}{low}, {high}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def _one_of(name: str, value: str, allowed: typing.Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(allowed)}, got {value!r}{nearest(value, allowed)}"
        )


@dataclass
class ScriptArguments:
    """What `dudi train` needs beside the trainer's own configuration."""

    model_name_or_path: str | None = _field(None, "The student to start from.")
    model_config: dict[str, Any] | None = _field(
        None, "Or a new one: model_type and its configuration (vocabulary from the tokenizer)."
    )
    tokenizer_name_or_path: str | None = _field(None, "By default the student's.")
    dataset_name: str | None = _field(
        None,
        "A JSONL, CSV or Parquet file, a saved dataset's folder, a Hub id, or demo: the embedded "
        "translations.",
    )
    dataset_config: str | None = _field(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = _field("train", "Split to train on.")
    dataset_test_name: str | None = _field(None, "Where the test set is, if elsewhere.")
    dataset_test_split: str | None = _field(None, "Split to evaluate on; none, no evaluation.")
    use_peft: bool = _field(False, "Train a LoRA adapter instead of the whole student.")
    lora_r: int = _field(16, "Rank of the adapter.")
    lora_alpha: int = _field(32, "Its scaling.")
    lora_dropout: float = _field(0.0, "Its dropout.")
    lora_target_modules: list[str] | str | None = _field(None, "Modules it adapts.")
    evaluate: bool = _field(True, "Evaluate before and after, where there is a test set.")
    eval_generate_rows: int | None = _field(
        32, "Test rows a language to translate greedily for chrF; None is all, 0 is none."
    )
    resume: bool = _field(False, "Go on from the newest whole checkpoint of output_dir.")
    overwrite: bool = _field(False, "Replace the run in output_dir.")

    def __post_init__(self) -> None:
        for name, wanted in field_types(type(self)).items():
            setattr(self, name, coerced(name, getattr(self, name), wanted))
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise ValueError("give exactly one of model_name_or_path and model_config")
        if self.model_config is not None and "model_type" not in self.model_config:
            raise ValueError("model_config must name a model_type, such as llama")
        if self.dataset_name is None:
            raise ValueError("dataset_name must be given")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        _between("lora_r", self.lora_r, 1, math.inf)
        _between("lora_alpha", self.lora_alpha, 1, math.inf)
        _between("lora_dropout", self.lora_dropout, 0, 1)
        _between("eval_generate_rows", self.eval_generate_rows or 0, 0, math.inf)


def _accelerated() -> bool:
    import torch

    return torch.accelerator.is_available()


class _Loader(yaml.SafeLoader):
    """YAML with the floats of its version 1.2, such as 5e-5, and None as another null."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])


def read_config_file(path: str | Path) -> dict[str, Any]:
    """A recipe: a YAML mapping of option names to values."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(loaded).__name__}")
    return loaded


def read_words(words: list[str], wanted: dict[str, Any]) -> dict[str, Any]:
    """`--name value` and `--name=value`; values as YAML reads them; a bare `--name` is true."""
    options: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise ValueError(f"expected --name, got {word!r}")
        name, equals, text = word[2:].partition("=")
        position += 1
        if not equals:
            if position < len(words) and not words[position].startswith("--"):
                text = words[position]
                position += 1
            else:
                text = "true"
        name = name.replace("-", "_")
        options[name] = _value_of_text(text, wanted.get(name))
    return options


def _value_of_text(text: str, wanted: Any) -> Any:
    """As YAML reads it, but text where text is wanted (`--run_name 007`) and a list where a list is
    wanted: `--languages th,vi`, `--seeds 1,2`."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    if value is None or isinstance(value, (list, dict)):
        return value
    members = _members(wanted)
    if str in members:
        return text if bool not in members else value
    lists = (m for m in members if typing.get_origin(m) is list)
    if any(typing.get_args(m)[0] in (str, int) for m in lists):  # brackets are a pattern to shells
        return [part.strip() for part in text.split(",")]
    return value


def checked(options: dict[Any, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Every name known, every value of its type."""
    for name in options:
        if name not in wanted:
            raise TypeError(f"unknown config key {name!r}{nearest(str(name), wanted)}")
    return {name: coerced(name, value, wanted[name]) for name, value in options.items()}


def parse(config_file: str | None, overrides: list[str]) -> tuple[ScriptArguments, DuDiConfig]:
    """A recipe file with overrides, as the command line gives them."""
    return from_options(read_options(config_file, overrides))


def read_options(
    config_file: str | None, overrides: list[str], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The options of a recipe file and of words, their names and types checked; `more`: types of a
    command's own."""
    options = read_config_file(config_file) if config_file else {}
    wanted = field_types(ScriptArguments) | field_types(DuDiConfig) | (more or {})
    return checked(options | read_words(overrides, wanted), wanted)


def from_options(options: dict[str, Any]) -> tuple[ScriptArguments, DuDiConfig]:
    """Sort options into the two dataclasses; unknown ones are errors."""
    script, config = field_types(ScriptArguments), field_types(DuDiConfig)
    values = checked(options, script | config)
    if not values.get("output_dir"):
        raise ValueError("output_dir must be given")
    own, rest = ({k: v for k, v in values.items() if k in names} for names in (script, config))
    return ScriptArguments(**own), DuDiConfig(**rest)


def read_arguments(cls: type, words: list[str]) -> Any:
    """A dataclass from command-line words; fields without a default must be among them."""
    values = checked(read_words(words, field_types(cls)), field_types(cls))
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.name not in values:
            raise ValueError(f"--{f.name} must be given")
    return cls(**values)


# ---- what a run records and what a resumed run must agree with -----------------------------------

# May differ between a run and its resumption: where it writes, what it tells, when it saves.
FREE_TO_CHANGE = (
    "output_dir", "run_name", "report_to", "logging_", "log_", "save_", "eval_", "hub_", "push_to",
    "disable_tqdm", "dataloader_num", "dataloader_p", "num_completions_to_print",
    "per_device_eval_batch_size", "load_best", "metric_for", "greater_is_better", "include_",
    "skip_memory", "do_", "debug",
    "memory_budget", "project", "trackio", "resume_from", "restore_callback", "use_cpu", "ddp_",
    "verbalizer_cache_dir", "served_timeout", "served_retries", "served_concurrency", "bad_rows",
    "teacher_cache", "teacher_url",  # whose answers they are is compared
    "vllm_url", "vllm_sync_dir", "vllm_tolerance", "vllm_timeout", "vllm_retries",
    "vllm_concurrency",
)  # fmt: skip


def to_public_dict(config: DuDiConfig) -> dict[str, Any]:
    """JSON-safe: our own fields, and the inherited ones that differ from their defaults."""
    own = set(DuDiConfig.__annotations__)
    values = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name, None)
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.init and not f.name.endswith("token") and (f.name in own or value != default):
            values[f.name] = json_safe(value)
    return values


def json_safe(value: Any) -> Any:
    """What JSON gives back as it was; a set in order, so that equal settings read alike."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)


def resume_mismatches(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Settings in which a checkpoint differs from the run that would go on from it."""
    names = sorted(n for n in saved.keys() | current.keys() if not n.startswith(FREE_TO_CHANGE))
    return [
        f"{name} was {_told(saved, name)}, is {_told(current, name)}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def _told(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "the default"
