"""What a step of a recipe will need on each rank, from configurations alone: memory by phase and
part, and FLOPs.

The phases of a step run one after another on tensors without numbers (phases.py), with every
sequence at its longest; to each peak comes what stays in memory all the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from dudi.config import DuDiConfig, ScriptArguments, checked, field_types, from_options
from dudi.models import learned_positions
from dudi.planning.micro import Load
from dudi.planning.models import Spec, build, student_spec, teacher_spec
from dudi.planning.sharding import sharded
from dudi.planning.step import Phase, count, device_of, standing, step_phases
from dudi.signals import lm_head

GIB = 2**30
RESERVED = 0.08  # of a GPU: CUDA context, libraries, fragmentation; assumed, not measured
NEED_A_GPU = ("bf16", "fp16", "tf32")


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
    shards: int  # ranks that hold the models together, by `fsdp_size`
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
            "shards": self.shards,
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
) -> RunPlan:
    """Memory and FLOPs of an optimizer step, before anything is loaded.

    Args:
        gpus: ranks, one a GPU.
        gpu_memory: what each has; `fits` then says whether 92 % of it hold the peak.
        lengths: of all sequences, where they are shorter than the limits of the recipe.

    Raises:
        ValueError: models that can't be found or planned; options out of range.
    """
    shards = _checked_shards(gpus, gpu_memory, config)
    student, teacher = student_spec(script, config), teacher_spec(config)
    load = _load(config, lengths)
    _check_positions(student, load.prompt_length, load)
    if teacher is not None:
        _check_positions(teacher, load.teacher_prompt_length, load)
    try:
        phases, flops = step_phases(student, teacher, config, load)
    except RuntimeError as error:  # of operators: what they make depends on numbers, for one
        raise ValueError(f"a model of this recipe can't be planned: {error}") from error
    stays = standing(student, teacher, config, gpus if shards == 1 else 1)
    whole = tuple(Phase(phase.name, stays | phase.parts) for phase in phases)
    if shards > 1:
        models = [build(spec) for spec in (student, teacher) if spec is not None]
        whole = tuple(phase._replace(parts=sharded(phase.parts, models, shards)) for phase in whole)
    parameters = {"student": count(student), "trained": count(student, trained=True)}
    if teacher is not None:
        parameters["teacher"] = count(teacher)
    return RunPlan(
        whole,
        flops,
        parameters,
        load,
        config.gradient_accumulation_steps,
        gpus,
        shards,
        device_of(config),
        gpu_memory,
        teacher is not None and _vocabulary(student) == _vocabulary(teacher),
    )


def _vocabulary(spec: Spec) -> int:
    return lm_head(build(spec)).vocab_size


def _checked_shards(gpus: int, gpu_memory: float | None, config: DuDiConfig) -> int:
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise ValueError(f"gpu_memory must be positive, in GiB, got {gpu_memory}")
    if config.fsdp_size is None:
        return 1
    shards = gpus if config.fsdp_size == "auto" else int(config.fsdp_size)
    if gpus % shards:
        raise ValueError(f"fsdp_size must divide gpus, {gpus}, got {shards}")
    return shards


def _load(config: DuDiConfig, lengths: Lengths) -> Load:
    prompt = _length("prompt_length", lengths.prompt, config.max_prompt_length)
    completion = _length("completion_length", lengths.completion, config.max_completion_length)
    teacher_prompt = min(prompt, config.max_teacher_prompt_length or prompt)
    if config.needs_teacher and config.context_verbalizer is not False:
        limit = config.max_teacher_prompt_length
        teacher_prompt = _length("teacher_prompt_length", lengths.teacher_prompt, limit)
    elif lengths.teacher_prompt is not None:
        raise ValueError("teacher_prompt_length: the teacher reads no prompt of its own")
    samples = config.num_generations * config.needs_samples  # of each prompt
    taught = sum((1, samples)[side] for side in config.taught_sides) * config.needs_teacher
    prompts = config.per_device_train_batch_size
    sides, drawn = config.needs_given + samples, config.rollout_batch_size or prompts * samples
    return Load(prompts, prompt, completion, teacher_prompt, sides, taught, drawn)


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
