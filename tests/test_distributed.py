"""Two ranks (gloo, CPU) do what one process does with the whole batch; wrappers' hooks run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).with_name("train_once.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(Path(__file__).parents[1]),  # bench/ is no installed package
}


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    run(str(SCRIPT), str(folder / "one"), "4")
    run(*LAUNCHER, str(SCRIPT), str(folder / "two"), "2")
    return folder


@pytest.mark.parametrize("teacher", ["same", "other"])
def test_two_ranks_equal_one(runs: Path, teacher: str) -> None:
    """Denominators are global and gradients are synchronised: equal losses, equal weights."""
    folders = [runs / name / teacher for name in ("one", "two")]
    one, two = (tiny.logged(folder) for folder in folders)
    assert len(one) == len(two) == 3
    keys = ["loss", "off_policy_loss", "ce_loss", "entropy", "grad_norm", "num_tokens"]
    keys += ["paired_rows", "confidence_gate", "teacher_entropy"] if teacher == "other" else []
    for a, b in zip(one, two, strict=True):
        for key in keys:
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    models = [AutoModelForCausalLM.from_pretrained(folder / "model") for folder in folders]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_loss_runs_inside_the_hooks_of_fsdp() -> None:
    """Sharded weights are whole where the kernels read them, and gradients are sharded again."""
    run(*LAUNCHER, str(SCRIPT.with_name("fsdp_once.py")))


def test_a_loss_that_is_not_finite_stops_both_ranks(tmp_path: Path) -> None:
    """One rank's row spoils its loss; neither rank hangs and both say what happened."""
    done = subprocess.run(
        [sys.executable, *LAUNCHER, str(SCRIPT), str(tmp_path), "2"],
        env=ENVIRONMENT | {"SPOIL": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "step 2: the loss is nan, dataset rows [" in done.stderr
    assert "step 2: another rank is at fault" in done.stderr
