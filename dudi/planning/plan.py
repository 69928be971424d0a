"""What a step of a recipe will need on each rank, from configurations alone: memory by phase and
part, and FLOPs.

The phases of a step run one after another on tensors without numbers (phases.py), with every
sequence at its longest; to each peak comes what stays in memory all the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from dudi.config import DuDiConfig, ScriptArguments, checked, field_types, from_options
from dudi.models import learned_positions
from dudi.planning.live import Peak
from dudi.planning.micro import Load, Loss, Precision
from dudi.planning.models import Spec, build, student_spec, teacher_spec
from dudi.planning.phases import (
    GRADIENTS,
    STATES,
    Refinement,
    Sampling,
    forward_backward,
    optimize,
    refer,
    sample,
    teach,
)
from dudi.planning.sharding import sharded
from dudi.signals import lm_head

GIB = 2**30
RESERVED = (
    0.08  # of a GPU, for the CUDA context, libraries and fragmentation: assumed, not measured
)
STUDENT, TEACHER, REFERENCE = "student weights", "teacher weights", "reference copy"
BUCKETS = "DDP buckets"
STRATEGIES = ("ddp", "fsdp")
NEED_A_GPU = ("bf16", "fp16", "tf32")


class Phase(NamedTuple):
    name: str
    parts: dict[str, int]  # bytes at the phase's peak

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class Lengths(NamedTuple):
    """In tokens; None is the recipe's limit."""

    prompt: int | None = None
    completion: int | None = None
    teacher_prompt: int | None = None


LIMITS = Lengths()


@dataclass(frozen=True)
class RunPlan:
    """Of one rank; all ranks are alike."""

    phases: tuple[Phase, ...]
    flops: dict[str, int]  # of an optimizer step
    parameters: dict[str, int]
    load: Load
    micro_batches: int  # of an optimizer step
    gpus: int
    strategy: str
    device: str
    gpu_memory: float | None  # GiB
    one_vocabulary: bool  # of student and teacher

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def room(self) -> int | None:
        """Bytes of a GPU that a plan may take; None where no size is given."""
        if self.gpu_memory is None:
            return None
        return int(self.gpu_memory * GIB * (1 - RESERVED))

    @property
    def fits(self) -> bool | None:
        return None if self.room is None else self.peak.bytes <= self.room

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; bytes and FLOPs of one rank."""
        return {
            "peak_bytes": self.peak.bytes,
            "peak_phase": self.peak.name,
            "fits": self.fits,
            "room_bytes": self.room,
            "phases": {p.name: {"bytes": p.bytes, "parts": p.parts} for p in self.phases},
            "flops": {**self.flops, "total": sum(self.flops.values())},
            "parameters": self.parameters,
            "micro_batch": self.load._asdict(),
            "micro_batches": self.micro_batches,
            "gpus": self.gpus,
            "gpu_memory_gib": self.gpu_memory,
            "strategy": self.strategy,
            "device": self.device,
        }


def read_options(options: dict[str, Any]) -> tuple[ScriptArguments, DuDiConfig]:
    """`config.from_options`, where a plan is made on a machine that can't run it: what transformers
    accepts with a GPU only is set afterwards."""
    types = field_types(DuDiConfig)
    later = checked({name: options[name] for name in NEED_A_GPU if name in options}, types)
    if later.get("bf16") and later.get("fp16"):
        raise ValueError("bf16 and fp16 exclude each other")
    unread = {"output_dir": "runs/plan", "dataset_name": "unread"}
    script, config = from_options(
        unread | {name: value for name, value in options.items() if name not in later}
    )
    for name, value in later.items():
        setattr(config, name, value)
    return script, config


def plan_run(
    script: ScriptArguments,
    config: DuDiConfig,
    *,
    gpus: int = 1,
    gpu_memory: float | None = None,  # GiB of each
    lengths: Lengths = LIMITS,
    strategy: str = "ddp",
) -> RunPlan:
    """Memory and FLOPs of an optimizer step, before anything is loaded.

    Args:
        gpus: ranks, one a GPU.
        gpu_memory: what each has; `fits` then says whether 92 % of it hold the peak.
        lengths: of all sequences, where they are shorter than the limits of the recipe.
        strategy: ddp, as the trainer runs; fsdp, an estimate of what the trainer refuses.

    Raises:
        ValueError: models that can't be found or planned; options out of range.
    """
    _check(gpus, gpu_memory, strategy)
    student, teacher = student_spec(script, config), teacher_spec(config)
    load = _load(config, lengths)
    _check_positions(student, load.prompt_length, load)
    if teacher is not None:
        _check_positions(teacher, load.teacher_prompt_length, load)
    try:
        phases, flops = _phases(student, teacher, config, load)
    except RuntimeError as error:  # of operators: what they make depends on numbers, for one
        raise ValueError(f"a model of this recipe can't be planned: {error}") from error
    standing = _standing(student, teacher, config, gpus if strategy == "ddp" else 1)
    whole = tuple(Phase(phase.name, standing | phase.parts) for phase in phases)
    if strategy == "fsdp":
        models = [build(spec) for spec in (student, teacher) if spec is not None]
        whole = tuple(phase._replace(parts=sharded(phase.parts, models, gpus)) for phase in whole)
    parameters = _count(build(student).parameters()), _count(_trained(student))
    return RunPlan(
        whole,
        flops,
        {"student": parameters[0], "trained": parameters[1]}
        | ({} if teacher is None else {"teacher": _count(build(teacher).parameters())}),
        load,
        config.gradient_accumulation_steps,
        gpus,
        strategy,
        _device(config),
        gpu_memory,
        teacher is not None and _vocabulary(student) == _vocabulary(teacher),
    )


def _vocabulary(spec: Spec) -> int:
    return lm_head(build(spec)).vocab_size


def _check(gpus: int, gpu_memory: float | None, strategy: str) -> None:
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise ValueError(f"gpu_memory must be positive, in GiB, got {gpu_memory}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")


def _device(config: DuDiConfig) -> str:
    return "cpu" if config.use_cpu else "cuda"


def _load(config: DuDiConfig, lengths: Lengths) -> Load:
    prompt = _length("prompt_length", lengths.prompt, config.max_prompt_length)
    completion = _length("completion_length", lengths.completion, config.max_completion_length)
    teacher_prompt = prompt
    if config.needs_teacher and config.context_verbalizer is not False:
        limit = config.max_teacher_prompt_length
        teacher_prompt = _length("teacher_prompt_length", lengths.teacher_prompt, limit)
    elif lengths.teacher_prompt is not None:
        raise ValueError("teacher_prompt_length: the teacher reads no prompt of its own")
    sides = config.needs_given + config.needs_samples
    taught = len(config.taught_sides) if config.needs_teacher else 0
    prompts = config.per_device_train_batch_size
    return Load(prompts, prompt, completion, teacher_prompt, sides, taught)


def _length(name: str, given: int | None, limit: int | None) -> int:
    if given is None and limit is None:
        raise ValueError(f"{name} must be given: the recipe has no max_{name}")
    if given is not None and not 1 <= given <= (limit or given):
        raise ValueError(f"{name} must be from 1 to max_{name}={limit}, got {given}")
    return int(given or limit or 0)


def _check_positions(spec: Spec, prompt: int, load: Load) -> None:
    limit, longest = learned_positions(build(spec)), prompt + load.completion_length
    if limit is not None and longest > limit:
        raise ValueError(
            f"{spec.argument} {spec.source!r} has {limit} positions, sequences have up to {longest}"
        )


# ---- what a step does ----------------------------------------------------------------------------


def _phases(
    student: Spec, teacher: Spec | None, config: DuDiConfig, load: Load
) -> tuple[list[Phase], dict[str, int]]:
    """What each phase adds to memory, and FLOPs of all micro-batches."""
    precision = Precision(_autocast(config))
    loss = _loss(teacher, config)
    times = config.gradient_accumulation_steps
    phases, flops = [], {}
    full = {GRADIENTS: _bytes(_trained(student))}
    earlier = full if times > 1 else {}  # micro-batches find the gradients of those before

    def add(name: str, parts: dict[str, int], count: int) -> None:
        phases.append(Phase(name, parts))
        flops[name] = count * times

    if config.needs_samples:
        sampling = Sampling(config.rollout_temperature, config.top_p, config.top_k)
        peak = sample(student, load, precision, sampling)
        add("sampling", peak.parts, peak.flops)
    if teacher is not None:
        refinement = Refinement(
            config.needs_plain_teacher,
            config.confidence_gating > 0 and config.off_policy_weight > 0,
            config.teacher_skip_tokens > 0 or load.taught < load.sides,
        )
        peak = teach(teacher, load, precision, refinement, loss)
        add("teacher forward", earlier | peak.parts, peak.flops)
    if _needs_copy(config):
        peak = refer(student, load, precision, loss)
        add("reference forward", earlier | peak.parts, peak.flops)
    step = forward_backward(student, load, precision, loss, times > 1)
    add("student forward", step.forward.parts, step.forward.flops)
    flops["fused loss"] = step.loss_flops * times
    add("student backward", step.backward.parts, step.backward.flops)
    peak = _optimizer(student, config)
    added = {part: size for part, size in peak.parts.items() if part != STATES}
    phases.append(Phase("optimizer step", added))
    return phases, flops


def _optimizer(student: Spec, config: DuDiConfig) -> Peak:
    name = getattr(config.optim, "value", config.optim)
    return optimize(student, name, config.optim_args)


def _autocast(config: DuDiConfig) -> torch.dtype | None:
    if config.fp16:
        return torch.float16
    return torch.bfloat16 if config.bf16 else None


def _loss(teacher: Spec | None, config: DuDiConfig) -> Loss:
    off, on, _ = config.kd_divergences
    active = [
        name
        for name, weight in ((off, config.off_policy_weight), (on, config.on_policy_weight))
        if weight > 0
    ]
    divergence = max(active, key=lambda name: name == "adaptive_kl", default="forward_kl")
    shape = None
    if teacher is not None:
        weight = lm_head(build(teacher)).weight
        shape = (*weight.shape, weight.dtype)
    return Loss(_device(config), config.memory_budget, divergence, shape)


def _needs_copy(config: DuDiConfig) -> bool:
    return config.preference_weight > 0 and config.reference in ("initial", "lagged")


def _standing(student: Spec, teacher: Spec | None, config: DuDiConfig, gpus: int) -> dict[str, int]:
    """What is in memory in every phase, from the second step on."""
    trained = _bytes(_trained(student))
    parts = {
        STUDENT: _bytes(_tensors(student)),
        STATES: _optimizer(student, config).parts.get(STATES, 0),
        TEACHER: 0 if teacher is None else _bytes(_tensors(teacher)),
        REFERENCE: trained * _needs_copy(config),
        BUCKETS: trained * (gpus > 1),
    }
    return {part: size for part, size in parts.items() if size}


def _tensors(spec: Spec) -> list[torch.Tensor]:
    model = build(spec)
    return [*model.parameters(), *model.buffers()]


def _trained(spec: Spec) -> list[nn.Parameter]:
    return [p for p in build(spec).parameters() if p.requires_grad]


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)
