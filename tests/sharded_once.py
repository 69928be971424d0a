"""For test_sharded.py: `sharded_once.py FOLDER RANKS CASE ...`, alone or in torchrun: short runs.

A rank takes its share of the same global batches, so that any number of ranks does the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny
import torch

from dudi.trainer import DuDiTrainer

ROWS, BATCH = 20, 4  # five micro-batches: steps of two and a last one of one
# All signals; samples are greedy, whichever rank draws them.
SIGNALS: dict[str, Any] = {"ce_weight": 0.5, "top_k": 1, "reference": "lagged"}
CASES: dict[str, dict[str, Any]] = {
    "tied": {"reference_sync_steps": 2, "memory_budget": 2**20},
    "untied": {"reference": "initial", "gradient_checkpointing": True},
    "adapter": {"reference": "initial", "max_grad_norm": 0.05},
}


def trainer(folder: Path, case: str, ranks: int, **settings: Any) -> DuDiTrainer:
    tied = case != "untied"
    vocab = tiny.VOCAB + 3  # parts of unequal size
    adapter = None
    if case == "adapter":
        from peft import LoraConfig

        adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    config = tiny.config(
        folder,
        **{
            "max_steps": -1,
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH // ranks,
            "gradient_accumulation_steps": 2,
            "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
            "fsdp_size": "auto",
            "optim": "sgd",
            "learning_rate": 1e-1,
            **SIGNALS,
            **CASES[case],
            **settings,
        },
    )
    return DuDiTrainer(
        tiny.model(0, vocab=vocab, layers=2, tied=tied),
        tiny.model(1, vocab=vocab, layers=2, tied=tied, width=48),
        args=config,
        train_dataset=tiny.rows(ROWS),
        eval_dataset=tiny.rows(6, "test"),
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
    )


def main(folder: Path, ranks: int, cases: list[str]) -> None:
    for case in cases:
        run = trainer(folder / case, case, ranks)
        figures = {"before": run.evaluate()}
        run.train()
        run.save_model(str(folder / case / "model"))
        figures["after"] = run.evaluate()
        if run.is_world_process_zero():
            (folder / case / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
