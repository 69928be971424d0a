"""For test_vllm.py, in .venv-vllm: a run with an engine in the process. `... FOLDER tied|untied`"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
from vllm_server import WIDTH

from dudi.trainer import DuDiTrainer


def main(folder: str, ends: str) -> None:
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16}
    args = tiny.config(
        Path(folder), rollout_backend="vllm", vllm_mode="colocate", vllm_engine_kwargs=engine,
        vllm_tolerance=1e-5, learning_rate=3e-2, max_steps=3,
    )  # fmt: skip
    DuDiTrainer(
        tiny.model(0, WIDTH, tied=ends == "tied"),
        tiny.model(1),
        args=args,
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
