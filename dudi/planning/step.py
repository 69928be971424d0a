"""What an optimizer step of a recipe does, phase by phase, and what is in memory all the while."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from dudi.config import DuDiConfig
from dudi.planning.live import Peak
from dudi.planning.micro import Load, Loss, Precision
from dudi.planning.models import Spec, build
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
from dudi.signals import lm_head

STUDENT, TEACHER, REFERENCE = "student weights", "teacher weights", "reference copy"
BUCKETS = "DDP buckets"


class Phase(NamedTuple):
    name: str
    parts: dict[str, int]  # bytes at the phase's peak

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def device_of(config: DuDiConfig) -> str:
    return "cpu" if config.use_cpu else "cuda"


def step_phases(
    student: Spec, teacher: Spec | None, config: DuDiConfig, load: Load
) -> tuple[list[Phase], dict[str, int]]:
    """What each phase adds to memory, and FLOPs of all micro-batches."""
    precision = Precision(_autocast(config))
    loss = _loss(teacher, config)
    times = config.gradient_accumulation_steps
    phases, flops = [], {}
    full = {GRADIENTS: _bytes(_trained(student))}
    earlier = full if times > 1 else {}  # micro-batches find the gradients of those before

    def add(name: str, parts: dict[str, int], operations: int) -> None:
        phases.append(Phase(name, parts))
        flops[name] = operations * times

    if config.needs_samples:
        sampling = Sampling(config.rollout_temperature, config.top_p, config.top_k)
        peak = sample(student, load, precision, sampling)
        share = load.prompts * config.num_generations / load.drawn
        add("sampling", peak.parts, round(peak.flops * share))
    if teacher is not None:
        refinement = Refinement(
            config.needs_plain_teacher,
            config.verbalized_share < 1,
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
    together = config.preference_weight > 0
    return Loss(device_of(config), config.memory_budget, divergence, shape, together)


def _needs_copy(config: DuDiConfig) -> bool:
    return config.preference_weight > 0 and config.reference in ("initial", "lagged")


def _reference_bytes(student: Spec, config: DuDiConfig) -> int:
    """Of the copy; a new adapter is switched off instead."""
    model = build(student)
    if not _needs_copy(config) or config.reference_on_cpu:
        return 0
    if config.reference == "initial" and hasattr(model, "disable_adapter"):
        return 0
    dtype = None if config.reference_dtype is None else getattr(torch, config.reference_dtype)
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in _trained(student))


def standing(student: Spec, teacher: Spec | None, config: DuDiConfig, gpus: int) -> dict[str, int]:
    """What is in memory in every phase, from the second step on."""
    trained = _bytes(_trained(student))
    parts = {
        STUDENT: _bytes(_tensors(student)),
        STATES: _optimizer(student, config).parts.get(STATES, 0),
        TEACHER: 0 if teacher is None else _bytes(_tensors(teacher)),
        REFERENCE: _reference_bytes(student, config),
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


def count(spec: Spec, trained: bool = False) -> int:
    """Parameters, or those that are trained."""
    return sum(p.numel() for p in build(spec).parameters() if p.requires_grad or not trained)
