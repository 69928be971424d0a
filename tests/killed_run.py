"""One tiny run for test_faults.py: `killed_run.py FOLDER KIND` goes on from the newest whole
checkpoint where there is one and tells on stdout where it is, to be killed at any moment."""

from __future__ import annotations

import sys
from typing import Any

import tiny
from peft import LoraConfig
from transformers import TrainerCallback

from dudi.checkpoints import last_checkpoint
from dudi.trainer import DuDiTrainer

SHARED = {
    "max_steps": -1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 3,
    "ce_weight": 0.5,
    "max_completion_length": 6,
}
KINDS: dict[str, dict[str, Any]] = {
    "lagged": {
        "rollout_steps": 3,
        "rollout_importance": True,
        "num_generations": 2,
        "reference": "lagged",
        "reference_sync_steps": 4,
        "weight_schedules": {
            "ce_weight": {"kind": "linear"},
            "on_policy_weight": {"kind": "warmup", "steps": 9},
        },
    },
    "adapter": {
        "rollout_steps": 2,
        "rollout_batch_size": 3,
        "reference": "initial",
        "disable_dropout": False,
        "lr_scheduler_type": "cosine",
    },
}
ADAPTER = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj"], task_type="CAUSAL_LM")


class Tell(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("begun at", state.global_step, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("step", state.global_step, flush=True)


def main(folder: str, kind: str, epochs: int) -> None:
    trainer = DuDiTrainer(
        tiny.model(0),
        tiny.model(1),
        args=tiny.config(folder, **SHARED, **KINDS[kind], num_train_epochs=epochs),
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
        callbacks=[Tell()],
        peft_config=ADAPTER if kind == "adapter" else None,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) is not None)
    trainer.save_model(f"{folder}/model")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
