"""`dudi cache-teacher`: ask a recipe's teacher once, before training.

Makes the trainer of the recipe, so that prompts, tokenizers and limits are those of the run, and
writes what its teacher says of y+: of the training data under the context verbalizer's prompt (and
under the plain one, where the recipe compares them), of the test data under the plain prompt.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dudi.config import DuDiConfig, ScriptArguments
from dudi.rollout import inference_mode_of
from dudi.run import build_trainer, quiet_libraries
from dudi.teacher_cache import Entry, columns_asked, entries, write_cache
from dudi.trainer import DuDiTrainer


def asked_by(trainer: DuDiTrainer) -> list[Entry]:
    """Every question about y+ that a run of this trainer will have."""
    found = []
    for split, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if dataset is not None:
            found += entries(dataset, columns_asked(trainer.args, split), trainer.bridge.pairing)
    return found


def run_caching(
    script: ScriptArguments,
    config: DuDiConfig,
    *,
    batch_size: int = 16,
    shard_mb: int = 256,
    console: Console | None = None,
) -> Path:
    """`dudi cache-teacher`: returns the folder, config.output_dir."""
    console = console or Console()
    for name, value in (("batch_size", batch_size), ("shard_mb", shard_mb)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.off_policy_weight == 0:
        raise ValueError(
            "off_policy_weight must be positive: nothing else asks a teacher about the given "
            "responses, which are what a cache holds"
        )
    quiet_libraries()
    config.teacher_cache = None
    trainer = build_trainer(script, config)
    quiet_libraries()
    if trainer.verbalizer is not None and trainer.verbalizer.reads_samples:
        raise ValueError(
            "a verbalizer template shows student_completion: what the teacher reads is made in "
            "each step of a run, and can't be cached before"
        )
    folder = Path(str(config.output_dir)).expanduser()
    with Progress(console=console, transient=True) as bar, inference_mode_of(trainer.teacher):
        task = bar.add_task("cache", total=None)
        made, kept = write_cache(
            folder,
            trainer.accelerator.unwrap_model(trainer.teacher),
            trainer.bridge.tokenizer,
            asked_by(trainer),
            batch_size=batch_size,
            shard_bytes=shard_mb * 2**20,
            tell=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(
        f"[bold]cache[/] {made:,} entries written, {kept:,} were there: teacher_cache: {folder}",
        soft_wrap=True,
    )
    return folder
