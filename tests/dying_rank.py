"""A short run for test_dying_ranks.py: `dying_rank.py FOLDER FAULT`, of which rank 1 breaks down in
its second step: raises, or is killed."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import tiny
from transformers import TrainerCallback

from dudi.trainer import DuDiTrainer


class Fault(TrainerCallback):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and os.environ["RANK"] == "1":
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no more of it on rank 1")


def main(folder: str, fault: str) -> None:
    trainer = DuDiTrainer(
        tiny.model(0),
        tiny.model(1),
        args=tiny.config(
            folder, per_device_train_batch_size=2, ddp_backend="gloo", save_strategy="steps",
            save_steps=1,
        ),
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
        callbacks=[Fault(fault)],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
