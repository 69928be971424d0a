"""A rank that breaks down ends the job on every rank, soon and with an error; nothing hangs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dudi.checkpoints import last_checkpoint

SCRIPT = Path(__file__).with_name("dying_rank.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SECONDS = 60  # from the fault to the end; the timeout of a collective is 1800


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(
        [sys.executable, *words], env={**os.environ, **more}, stderr=subprocess.PIPE, text=True
    )


def check_what_is_left(folder: Path) -> None:
    """The fault comes after the first checkpoint; the end soon after the fault."""
    saved = last_checkpoint(folder)
    assert saved is not None and saved.name == "checkpoint-1"
    assert time.time() - saved.stat().st_mtime < SECONDS


@pytest.mark.parametrize(
    ("fault", "told"),
    [("raises", "[rank1]: MemoryError: no more of it on rank 1"), ("killed", "Signal 9 (SIGKILL)")],
)
def test_torchrun_ends_with_the_first_error(tmp_path: Path, fault: str, told: str) -> None:
    job = start(*LAUNCHER, str(SCRIPT), str(tmp_path), fault)
    _, errors = job.communicate(timeout=300)
    check_what_is_left(tmp_path)
    assert job.returncode == 1 and told in errors, errors[-4000:]
    assert "rank      : 1 (local_rank: 1)" in errors.partition("Root Cause")[2]


@pytest.mark.slow
def test_without_a_launcher_the_other_rank_ends_by_itself(tmp_path: Path) -> None:
    """As under srun or mpirun: nobody stops the ranks that are left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start(
            str(SCRIPT),
            str(tmp_path),
            "killed",
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in ("0", "1")
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    check_what_is_left(tmp_path)
    assert [rank.returncode for rank in ranks] == [1, -9], errors[0][-4000:]
    assert "RuntimeError" in errors[0] and "peer" in errors[0]
