"""For test_sharded.py: `sharded_once.py FOLDER CASE ...`, alone or in torchrun: short runs.

A rank takes its share of the same global batches and samples are greedy, so any number of ranks
does the same. The case `parts` looks at what the ranks hold, and goes on from a checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dudi.rollout import generate
from dudi.run import leave_ranks
from dudi.sharding import local, make_mesh, shard
from dudi.trainer import DuDiTrainer

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
BATCH = 4
# Five micro-batches: steps of two and a last one of one. With 17 rows one rank has the last row of
# it, others none; with 19 one of two has a row less.
ROWS = {"ddp": 17, "ddp of four": 18, "all four": 17, "replicas": 19, "adapter": 19}
VOCAB = tiny.VOCAB + 3  # parts of unequal size
CASES: dict[str, dict[str, Any]] = {
    "tied": {"reference": "lagged", "reference_sync_steps": 2, "max_grad_norm": 0.05},
    "untied": {"gradient_checkpointing": True, "per_device_train_batch_size": 20 // RANKS},
    "adapter": {"beta": 0.5},
    "replicas": {"fsdp_size": 2 if RANKS > 1 else "auto"},
    "all four": {"reference": "teacher"},
    "ddp": {"fsdp_size": None, "rollout_cache": "paged"},
    "ddp of four": {"fsdp_size": None, "reference": "lagged"},
    "parts": {
        "optim": "adamw_torch_fused",
        "bf16": True,  # no forward without gradients may spoil the next one with them
        "save_strategy": "steps",
        "save_steps": 1,
    },
}


def model(seed: int, case: str, width: int = 32) -> Any:
    return tiny.model(seed, width, VOCAB, layers=2, tied=case != "untied")


def trainer(folder: Path, case: str) -> DuDiTrainer:
    adapter = None
    if case == "adapter":
        from peft import LoraConfig

        adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "max_steps": -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH // RANKS,
        "gradient_accumulation_steps": 2,
        "ddp_backend": "gloo" if RANKS > 1 else None,
        "fsdp_size": "auto",
        "optim": "sgd",
        "learning_rate": 1e-1,
        "ce_weight": 0.5,
        "top_k": 1,
    }
    return DuDiTrainer(
        model(0, case),
        model(1, case, width=48),
        args=tiny.config(folder, **(settings | CASES[case])),
        train_dataset=tiny.rows(ROWS.get(case, 20)),
        eval_dataset=tiny.rows(6, "test"),
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
    )


def train(folder: Path, case: str) -> None:
    run = trainer(folder, case)
    figures = {"before": run.evaluate()}
    run.train()
    run.save_model(str(folder / "model"))
    figures["after"] = run.evaluate()
    if run.is_world_process_zero():
        (folder / "figures.json").write_text(json.dumps(figures))


def look_at_parts(folder: Path) -> None:
    run = trainer(folder / "whole", "parts")
    run.train()
    optimizer: Any = run.optimizer
    assert optimizer.state.keys() == set(run.model.parameters())  # each had a gradient
    state = [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    for tensors in (run.model.parameters(), run.teacher.parameters(), state):
        for t in tensors:
            assert isinstance(t, DTensor)
            assert local(t).numel() <= -(-t.shape[0] // RANKS) * t[0].numel()
    again = trainer(folder / "again", "parts")
    again.train(str(folder / "whole" / "checkpoint-1"))
    for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(local(a), local(b))
    saved = torch.load(folder / "whole" / "checkpoint-1" / "optimizer.pt")["state"].values()
    assert all(type(own["exp_avg"]) is torch.Tensor for own in saved)
    wanted = sorted(tuple(weight.shape) for weight in model(0, "parts").parameters())
    assert sorted(tuple(own["exp_avg"].shape) for own in saved) == wanted
    each_rank_writes_as_long_as_it_likes(run)
    models_that_differ()


def each_rank_writes_as_long_as_it_likes(run: DuDiTrainer) -> None:
    """A rank that has finished does not wait for one that has not, nor the other way round."""
    whole = model(0, "parts").to(torch.bfloat16)
    whole.load_state_dict({n: t.full_tensor() for n, t in run.model.state_dict().items()})
    for cache in ("dynamic", "static", "paged"):
        ours, theirs = (
            generate(
                own,
                [torch.arange(5, 9), torch.arange(30, 36)],
                max_completion_length=3 + 4 * dist.get_rank(),
                eos_token_id=1,
                pad_token_id=0,
                temperature=0.0,
                cache=cache,
                autocast=torch.bfloat16,
            ).completions
            for own in (run.model, whole)
        )
        assert [c.tolist() for c in ours] == [c.tolist() for c in theirs], cache


def models_that_differ() -> None:
    mesh = make_mesh("auto", torch.device("cpu"))
    assert mesh is not None
    try:
        shard(model(dist.get_rank(), "parts"), mesh, "student")
    except ValueError as error:
        assert "the student differs between the ranks" in str(error)
    else:
        raise AssertionError("models that differ were sharded together")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        run_case = look_at_parts if case == "parts" else lambda f, case=case: train(f, case)
        run_case(Path(sys.argv[1]) / case)
    leave_ranks()
