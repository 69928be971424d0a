"""What to change where a run does not fit, each with the bytes that it saves: planned again.

Changes come in the order of what they do to training: nothing first (the same global batch, the
same gradients), rounding next, then another objective or shorter sequences. Each is tried alone;
then, one upon another in that order, until the run fits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dudi.config import SHARDED_OPTIMIZERS, DuDiConfig, ScriptArguments
from dudi.planning.plan import LIMITS, Lengths, RunPlan, plan_run

SMALL_BUDGET = 64 * 2**20  # bytes of workspace that slow the loss down little


@dataclass(frozen=True)
class Recipe:
    """What is planned."""

    script: ScriptArguments
    config: DuDiConfig
    lengths: Lengths = LIMITS

    def configured(self, **fields: Any) -> Recipe:
        config = copy.copy(self.config)
        for name, value in fields.items():
            setattr(config, name, value)
        return replace(self, config=config)


Lines = tuple[str, ...]  # of a recipe


class Advice(NamedTuple):
    change: Lines
    effect: str  # on training
    saved: int  # bytes at the peak, compared with the plan before
    plan: RunPlan


Found = tuple[Lines, Recipe] | None  # None: nothing to change
Change = Callable[[Recipe, RunPlan], Found]


def _checkpointing(recipe: Recipe, plan: RunPlan) -> Found:
    if recipe.config.activation_checkpointing:
        return None
    return ("activation_checkpointing: true",), recipe.configured(activation_checkpointing=True)


def _smaller_batch(recipe: Recipe, plan: RunPlan) -> Found:
    batch, times = plan.load.prompts, plan.micro_batches
    if batch % 2:
        return None
    fields = {
        "per_device_train_batch_size": batch // 2,
        "gradient_accumulation_steps": 2 * times,
    }
    return _told(fields), recipe.configured(**fields)


def _sharded(recipe: Recipe, plan: RunPlan) -> Found:
    config = recipe.config
    refused = config.fp16 or getattr(config.optim, "value", config.optim) not in SHARDED_OPTIMIZERS
    given = (config.model_init_kwargs or {}, config.teacher_model_init_kwargs or {})
    packed = any(name.startswith(("load_in_", "quantization_")) for own in given for name in own)
    if config.fsdp_size is not None or plan.gpus == 1 or refused or packed:
        return None
    return ("fsdp_size: auto",), recipe.configured(fsdp_size="auto")


def _smaller_budget(recipe: Recipe, plan: RunPlan) -> Found:
    if recipe.config.memory_budget <= SMALL_BUDGET:
        return None
    fields = {"memory_budget": SMALL_BUDGET}
    return _told(fields), recipe.configured(**fields)


def _half_teacher(recipe: Recipe, plan: RunPlan) -> Found:
    config = recipe.config
    given = dict(config.teacher_model_init_kwargs or {})
    if not config.needs_teacher or str(given.get("dtype", "")).endswith(("bfloat16", "float16")):
        return None
    kwargs = {name: v for name, v in given.items() if name != "torch_dtype"} | {"dtype": "bfloat16"}
    told = "teacher_model_init_kwargs: {dtype: bfloat16}"
    return (told,), recipe.configured(teacher_model_init_kwargs=kwargs)


def _autocast(recipe: Recipe, plan: RunPlan) -> Found:
    if recipe.config.bf16 or recipe.config.fp16:
        return None
    return ("bf16: true",), recipe.configured(bf16=True)


def _reference(recipe: Recipe, plan: RunPlan) -> Found:
    config = recipe.config
    copied = config.preference_weight > 0 and config.reference in ("initial", "lagged")
    if not copied or not plan.one_vocabulary or config.teacher_top_p < 1:
        return None
    return ("reference: teacher",), recipe.configured(reference="teacher")


def _adapter(recipe: Recipe, plan: RunPlan) -> Found:
    if recipe.script.use_peft:
        return None
    script = replace(recipe.script, use_peft=True, lora_target_modules="all-linear")
    return ("use_peft: true", "lora_target_modules: all-linear"), replace(recipe, script=script)


def _shorter(recipe: Recipe, plan: RunPlan) -> Found:
    load = plan.load
    fields = {
        "max_prompt_length": load.prompt_length // 2,
        "max_completion_length": load.completion_length // 2,
        "max_teacher_prompt_length": load.teacher_prompt_length // 2,
    }
    if not recipe.config.needs_teacher:
        del fields["max_teacher_prompt_length"]
    if min(fields.values()) < 16:
        return None
    return _told(fields), replace(recipe.configured(**fields), lengths=LIMITS)


def _told(fields: dict[str, int]) -> Lines:
    return tuple(f"{name}: {value}" for name, value in fields.items())


CHANGES: tuple[tuple[Change, str], ...] = (
    (_checkpointing, "none; a third more time"),
    (_smaller_batch, "none; the same global batch"),
    (_smaller_budget, "none; a slower loss"),
    (_sharded, "none; layers are gathered"),
    (_half_teacher, "the teacher is rounded"),
    (_autocast, "GEMMs in bf16"),
    (_reference, "another reference policy"),
    (_adapter, "an adapter is trained"),
    (_shorter, "longer rows are cut or dropped"),
)


def advise(recipe: Recipe, plan: RunPlan) -> Iterator[Advice]:
    """Each change alone, with what it saves; those that save nothing are left out."""
    for change, effect in CHANGES:
        found = _tried(change, recipe, plan)
        if found is not None:
            told, _, then = found
            yield Advice(told, effect, plan.peak.bytes - then.peak.bytes, then)


def make_fit(recipe: Recipe, plan: RunPlan) -> list[Advice]:
    """Changes one upon another until the run fits, or nothing is left to change."""
    taken: list[Advice] = []
    for change, effect in CHANGES:
        while not plan.fits:
            found = _tried(change, recipe, plan)
            if found is None:
                break
            told, recipe, then = found
            saved = plan.peak.bytes - then.peak.bytes
            if taken and taken[-1].effect == effect:  # a half of a half tells of both
                saved += taken.pop().saved
            taken.append(Advice(told, effect, saved, then))
            plan = then
    return taken


def _tried(change: Change, recipe: Recipe, plan: RunPlan) -> tuple[Lines, Recipe, RunPlan] | None:
    """None where a change does not apply, can't be planned or saves nothing."""
    found = change(recipe, plan)
    if found is None:
        return None
    told, changed = found
    try:
        then = plan_run(
            changed.script,
            changed.config,
            gpus=plan.gpus,
            gpu_memory=plan.gpu_memory,
            lengths=changed.lengths,
        )
    except ValueError:
        return None
    return (told, changed, then) if then.peak.bytes < plan.peak.bytes else None
