"""Short runs for test_distributed.py: `train_once.py FOLDER BATCH_SIZE`, alone or in torchrun.

One with a teacher of the student's tokenizer, one with a teacher of another.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import tiny
import vocabularies
from transformers import TrainerCallback

from dudi.run import leave_ranks
from dudi.trainer import DuDiTrainer


class Spoil(TrainerCallback):
    """A NaN in the weights of rank 1 before step 2."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and os.environ.get("RANK") == "1":
            kwargs["model"].model.norm.weight.data.fill_(float("nan"))


def main(folder: str, batch_size: int, other: bool) -> None:
    config = tiny.config(
        folder,
        per_device_train_batch_size=batch_size,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        on_policy_weight=0.0,
        preference_weight=0.0,  # samples depend on the rank that draws them
        ce_weight=0.5,
        optim="sgd",
        max_steps=3,
        confidence_gating=0.5 if other else 0.0,
        unmatched="renormalize",
        verbalizer_cache_dir=None,
    )
    tokenizer = vocabularies.trained_byte_level() if other else tiny.tokenizer()
    trainer = DuDiTrainer(
        tiny.model(0),
        tiny.model(1, vocab=len(tokenizer)),
        args=config,
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
        teacher_processing_class=tokenizer,
        callbacks=[Spoil()] if os.environ.get("SPOIL") else None,
    )
    trainer.train()
    trainer.save_model(f"{folder}/model")


if __name__ == "__main__":
    for name in ("same", "other"):
        main(f"{sys.argv[1]}/{name}", int(sys.argv[2]), name == "other")
    leave_ranks()
