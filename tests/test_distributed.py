"""Two ranks (gloo, CPU) do what one process does with the whole batch; wrappers' hooks run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dudi.callbacks import read_jsonl

SCRIPT = Path(__file__).with_name("train_once.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Denominators are global and gradients are synchronised: equal losses, equal weights."""
    run(str(SCRIPT), str(tmp_path / "one"), "4")
    run(*LAUNCHER, str(SCRIPT), str(tmp_path / "two"), "2")
    one, two = (
        [r for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "off_policy_loss", "ce_loss", "entropy", "grad_norm", "num_tokens"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in ("one", "two")]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_loss_runs_inside_the_hooks_of_fsdp() -> None:
    """Sharded weights are whole where the kernels read them, and gradients are sharded again."""
    run(*LAUNCHER, str(SCRIPT.with_name("fsdp_once.py")))


def test_a_loss_that_is_not_finite_stops_both_ranks(tmp_path: Path) -> None:
    """One rank's row spoils its loss; neither rank hangs and both say what happened."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "SPOIL": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCHER, str(SCRIPT), str(tmp_path), "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "step 2: the loss is nan, dataset rows [" in done.stderr
    assert "step 2: another rank is at fault" in done.stderr
