"""For test_hf_trainer_backend.py: `hf_train_once.py FOLDER BATCH_SIZE ACCUMULATION`, alone or in
torchrun: a short run of the recipe in docs/backends.md."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tiny
from recipes import recipe

from dudi.run import leave_ranks


def main(folder: str, batch_size: int, accumulation: int) -> None:
    args = tiny.training_arguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    trainer = recipe("DistillTrainer")(
        tiny.model(0), args, train_dataset=tiny.examples(24), teacher=tiny.model(1)
    )
    trainer.train()
    trainer.save_model(f"{folder}/model")
    if trainer.is_world_process_zero():
        lines = [json.dumps(entry) for entry in trainer.state.log_history if "loss" in entry]
        Path(folder, "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    leave_ranks()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]))
