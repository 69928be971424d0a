"""`dudi train --miniature`: run a recipe's miniature; tell what was checked and changed.

The run is an ordinary one, of `run_training`; what is told is read from what it wrote. It lies in
the output_dir of the command line, or in a folder that is removed: never in the recipe's own, where
the real run will be.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dudi.callbacks import METRICS_FILE, read_jsonl
from dudi.checkpoints import check_output_dir
from dudi.config import DuDiConfig, from_options
from dudi.miniature.recipe import STEPS, Miniature, Model, miniature
from dudi.run import quiet_libraries, run_training

SIGNALS = {
    "off_policy_weight": "off_policy_loss",
    "on_policy_weight": "on_policy_loss",
    "preference_weight": "preference_loss",
    "ce_weight": "ce_loss",
}
# Told in rows of their own, or of no interest: where things lie.
UNTOLD = (
    "dataset_train_split", "logging_steps", "max_steps", "model_config", "output_dir", "report_to",
    "use_cpu", "verbalizer_cache_dir",
)  # fmt: skip


def run_miniature(
    options: dict[str, Any],  # of a recipe, each of its type
    output_dir: str | None,  # of the command line; None: a folder that is removed
    *,
    console: Console,
    command: str | None = None,
) -> Miniature:
    """Run the miniature of a recipe and print what was checked; returns what it was.

    Raises what the recipe's own run would raise, and ValueError for models whose architecture
    can't be told or made small, and for a signal that is on but has no loss.
    """
    quiet_libraries()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("miniature must run in one process: leave torchrun out")
    started = time.monotonic()
    if output_dir is not None:
        overwrite = bool(options.get("overwrite"))
        check_output_dir(output_dir, resume=False, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="dudi-miniature-") as place:
        made = miniature(options, Path(place))
        folder = Path(output_dir or Path(place) / "run")
        script, config = from_options(made.options | {"output_dir": str(folder)})
        run_training(script, config, console=Console(quiet=True), command=command)
        steps = [r for r in read_jsonl(folder / METRICS_FILE) if "loss" in r]
        check_signals(config, steps)
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        console.print(_checked(made, config, info, folder, steps))
        console.print(_changed(made))
    kept = f"; it is kept in {output_dir}" if output_dir is not None else ""
    console.print(
        f"The miniature took {STEPS} steps, in {time.monotonic() - started:.0f} s{kept}. Its "
        "losses are those of random models; memory and speed are the full run's own affair.",
        highlight=False,
    )
    return made


def check_signals(config: DuDiConfig, steps: list[dict[str, Any]]) -> None:
    """Raise unless each signal that is on has a finite loss in every step."""
    if len(steps) != STEPS:
        raise ValueError(f"the miniature must take {STEPS} steps, it took {len(steps)}")
    for weight, loss in SIGNALS.items():
        values = [step.get(loss) for step in steps]
        finite = all(value is not None and math.isfinite(value) for value in values)
        if getattr(config, weight) > 0 and not finite:
            raise ValueError(f"{weight} is {getattr(config, weight)}, but its losses are {values}")


# ---- what is told --------------------------------------------------------------------------------


def _checked(
    made: Miniature,
    config: DuDiConfig,
    info: dict[str, Any],
    folder: Path,
    steps: list[dict[str, Any]],
) -> Table:
    table = Table("checked", "what it is", title="A miniature of this recipe")
    rows = [
        ("student", _model(made.student, info["parameters"])),
        ("teacher", made.teacher and _model(made.teacher, info["teacher_parameters"])),
        ("vocabularies", _vocabularies(made, info)),
        ("data", _data(info)),
        *_signals(config, steps),
        ("context verbalizer", _verbalizer(config, steps)),
        ("reference", _reference(config)),
        ("schedules", _schedules(config)),
        ("samples", _samples(config)),
        ("adapter", _adapter(folder / "model")),
        ("precision", "bf16" if config.bf16 else "fp16" if config.fp16 else "fp32"),
        ("checkpointing", "of activations" if config.activation_checkpointing else None),
        ("bodies", "without padding" if config.padding_free else None),
        ("saved", ", ".join(sorted(p.name for p in folder.glob("checkpoint-*"))) or None),
    ]
    for name, text in rows:
        if text:
            table.add_row(name, Text(text))
    return table


def _model(model: Model, parameters: int) -> str:
    return f"{model.name}: a {model.model_type} of {parameters:,} parameters"


def _vocabularies(made: Miniature, info: dict[str, Any]) -> str | None:
    if made.teacher is None:
        return f"a small {made.student.tokenizer} tokenizer"
    found = info["vocabulary"]
    if found is None:
        return "one tokenizer, heads of one size"
    told = "heads of two sizes" if found["same tokenizer"] else "two tokenizers"
    return f"{told}, {found['map']}; {found['coverage']:.1%} of the teacher's mass has a partner"


def _data(info: dict[str, Any]) -> str:
    counts = info["data"]["train"]
    told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n)
    return f"{told}; languages: {', '.join(info['languages']) or 'not told'}"


def _signals(config: DuDiConfig, steps: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    off, on, beta = config.kd_divergences
    shares = {name: f"{name}({beta:g})" if name == "jsd" else name for name in (off, on)}
    kinds = {
        "off_policy_weight": shares[off],
        "on_policy_weight": shares[on],
        "preference_weight": config.preference_loss,
        "ce_weight": "cross-entropy",
    }
    return [
        (
            weight.removesuffix("_weight").replace("_", "-"),
            f"weight {getattr(config, weight):g}, {kinds[weight]}: "
            + " -> ".join(f"{step[loss]:.4g}" for step in steps)
            if getattr(config, weight) > 0
            else None,
        )
        for weight, loss in SIGNALS.items()
    ]


def _verbalizer(config: DuDiConfig, steps: list[dict[str, Any]]) -> str | None:
    if not config.needs_teacher or "verbalizer_shift" not in steps[-1]:
        on = config.needs_teacher and config.context_verbalizer
        return "on" if on else None
    return f"on; it moves the teacher by {steps[-1]['verbalizer_shift']:.3g}"


def _reference(config: DuDiConfig) -> str | None:
    if not config.preference_weight > 0:
        return None
    told = f", refreshed every {config.reference_sync_steps} steps"
    return config.reference + (told if config.reference == "lagged" else "")


def _schedules(config: DuDiConfig) -> str | None:
    told = [f"{name}: {s.kind}" for name, s in config.schedules.items()]
    rate = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    return ", ".join([*told, f"learning rate: {rate}"])


def _samples(config: DuDiConfig) -> str | None:
    if not config.needs_samples:
        return None
    return f"{config.num_generations} of each prompt, for {config.rollout_steps} steps at once"


def _adapter(model: Path) -> str | None:
    path = model / "adapter_config.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    modules = {name.rpartition(".")[2] for name in found["target_modules"]}
    return f"LoRA of rank {found['r']} on {', '.join(sorted(modules))}"


def _changed(made: Miniature) -> Table:
    table = Table("changed", "recipe", "miniature")
    for name, (before, after) in made.changes.items():
        if name not in UNTOLD and "name" not in name:
            table.add_row(name, Text(_shown(before)), Text(_shown(after)))
    return table


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)
