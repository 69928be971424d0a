"""For test_vllm_rollout.py, in torchrun: `... FOLDER URL`: runs whose samples one server draws, the
student whole on each rank, in parts, and in parts with an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
from peft import LoraConfig

from dudi.run import leave_ranks
from dudi.trainer import DuDiTrainer

ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "parts": {"fsdp_size": "auto"},
    "adapter": {"fsdp_size": "auto", "peft_config": ADAPTER},
}


def main(folder: str, url: str) -> None:
    for name, case in CASES.items():
        own = dict(case)
        adapter = own.pop("peft_config", None)
        args = tiny.config(
            Path(folder) / name, rollout_backend="vllm", vllm_url=url, vllm_tolerance=1e-5,
            learning_rate=3e-2, max_steps=3, ddp_backend="gloo", optim="sgd", reference="none",
            per_device_train_batch_size=2, **own,
        )  # fmt: skip
        DuDiTrainer(
            tiny.model(0),
            tiny.model(1),
            args=args,
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
            peft_config=adapter,
        ).train()
    leave_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])
