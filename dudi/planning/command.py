"""The command `dudi plan`: plan, tell, advise where it does not fit, keep as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from dudi.callbacks import write_text
from dudi.planning.advice import Advice, Recipe, advise, make_fit
from dudi.planning.plan import Lengths, RunPlan, plan_run, read_options
from dudi.planning.table import advice_table, show_plan
from dudi.run import quiet_libraries


def run_plan(
    options: dict[str, Any],  # of a recipe, unchecked
    *,
    gpus: int,
    gpu_memory: float | None,
    prompt_length: int | None,
    completion_length: int | None,
    teacher_prompt_length: int | None,
    json_file: str | None,
    console: Console,
) -> RunPlan:
    """Plan a recipe and print it; `json_file` gets the figures."""
    quiet_libraries()
    script, config = read_options(options)
    lengths = Lengths(prompt_length, completion_length, teacher_prompt_length)
    plan = plan_run(script, config, gpus=gpus, gpu_memory=gpu_memory, lengths=lengths)
    show_plan(plan, console)
    found: dict[str, list[Advice]] = {}
    if plan.fits is False:
        recipe = Recipe(script, config, lengths)
        with console.status("planning what to change"):
            found = {"changes": list(advise(recipe, plan)), "together": make_fit(recipe, plan)}
        _show_advice(found["changes"], found["together"], console)
    if json_file is not None:
        told = {name: [_public(one) for one in advice] for name, advice in found.items()}
        write_text(Path(json_file), json.dumps(plan.to_dict() | told, indent=1))
    return plan


def _show_advice(alone: list[Advice], together: list[Advice], console: Console) -> None:
    console.print(advice_table("What to change, each alone", alone))
    if not together or not together[-1].plan.fits:
        console.print("All of it together does not make it fit: a smaller student or teacher will.")
    elif len(together) > 1:
        console.print(advice_table("One upon another, until it fits", together))


def _public(advice: Advice) -> dict[str, Any]:
    return {
        "change": advice.change,
        "effect": advice.effect,
        "saved_bytes": advice.saved,
        "peak_bytes": advice.plan.peak.bytes,
        "fits": advice.plan.fits,
    }
