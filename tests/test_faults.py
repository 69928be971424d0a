"""Runs that are killed, torn checkpoints, disks that are full: nothing that was reached is lost,
and what goes on is bit for bit what would have been."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from dudi.callbacks import read_jsonl
from dudi.checkpoints import last_checkpoint, why_not_whole
from dudi.saving import STAGING, DiskError, disk_errors
from dudi.trainer import DuDiTrainer

SCRIPT = Path(__file__).with_name("killed_run.py")


# ---- killed at any moment ------------------------------------------------------------------------


def start(folder: Path, kind: str, epochs: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(SCRIPT), str(folder), kind, str(epochs)]
    with log_of(folder).open("a") as log:
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )


def log_of(folder: Path) -> Path:
    return folder.with_suffix(".log")


def finish(run: subprocess.Popen[str], folder: Path) -> None:
    run.communicate(timeout=300)
    assert run.returncode == 0, log_of(folder).read_text()[-4000:]


def kill(run: subprocess.Popen[str], folder: Path, chance: random.Random) -> bool:
    """SIGKILL some steps after its beginning: anywhere in a step, or where a checkpoint has begun
    to be written. Whether it died within a write."""
    assert run.stdout is not None
    told = iter(run.stdout)
    while (line := next(told, "")) and not line.startswith("begun"):
        pass
    for _ in range(chance.choice((0, 1, 1, 2))):
        line = next(told, "")
    assert line, log_of(folder).read_text()[-4000:]
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0, 0.2))
    else:
        limit = time.monotonic() + 20
        while not (folder / STAGING).exists() and time.monotonic() < limit:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.03))
    run.kill()
    run.communicate()
    assert run.returncode == -9, "the run ended before it was killed"
    return (folder / STAGING).exists()


def state_of(folder: Path) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    ends = read_jsonl(folder / "metrics.jsonl")[-1]
    (weights,) = (folder / "model").glob("*model.safetensors")
    return tiny.logged(folder), ends["train_loss"], load_file(weights)


def check_kills(tmp_path: Path, kind: str, kills: int, epochs: int, seed: int) -> int:
    """How many of the kills were within the write of a checkpoint."""
    chance = random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(whole, kind, epochs), whole)
    within = sum(kill(start(cut, kind, epochs), cut, chance) for _ in range(kills))
    finish(start(cut, kind, epochs), cut)
    (a, loss_a, weights_a), (b, loss_b, weights_b) = state_of(whole), state_of(cut)
    assert len(a) == 2 * epochs and a == b and loss_a == loss_b
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)
    assert not (cut / STAGING).exists()
    return within


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_kills(tmp_path, "lagged", kills=2, epochs=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [("lagged", 1), ("adapter", 2)])
def test_a_run_killed_often_goes_on_bit_for_bit(tmp_path: Path, kind: str, seed: int) -> None:
    assert check_kills(tmp_path, kind, kills=20, epochs=8, seed=seed) > 2


# ---- torn checkpoints ----------------------------------------------------------------------------


def make(folder: Path, **settings: Any) -> DuDiTrainer:
    defaults = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    callbacks = settings.pop("callbacks", None)
    return DuDiTrainer(
        tiny.model(0),
        tiny.model(1),
        args=tiny.config(folder, **(defaults | settings)),
        train_dataset=tiny.rows(),
        eval_dataset=tiny.rows(4, "test"),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
    )


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


TEARS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model.safetensors", cut_short, "model.safetensors has"),
    ("trainer_state.json", cut_short, "trainer_state.json has"),
    ("optimizer.pt", empty, "optimizer.pt has 0 bytes"),
    ("samples-0.safetensors", Path.unlink, "samples-0.safetensors is not there"),
    ("manifest.json", cut_short, "manifest.json can't be read"),
    ("manifest.json", Path.unlink, "no manifest.json"),
]


def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path: Path) -> None:
    whole = make(tmp_path)
    whole.train()
    newest = tmp_path / "checkpoint-3"
    (tmp_path / STAGING / "checkpoint-4").mkdir(parents=True)  # a killed write left it
    for name, tear, why in TEARS:
        kept = (newest / name).read_bytes()
        tear(newest / name)
        with pytest.warns(UserWarning, match=f"checkpoint-3 is not whole .*{why}"):
            assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        (newest / name).write_bytes(kept)
    cut_short(newest / "model.safetensors")
    again = make(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-3 is not whole"):
        again.train(resume_from_checkpoint=True)
    assert why_not_whole(newest) is None and not (tmp_path / STAGING).exists()
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_checkpoint_is_kept_under_its_own_name(tmp_path: Path) -> None:
    """Written elsewhere first, found again at the end, spared by the limit."""
    trainer = make(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first is the best: training lowers it
        save_total_limit=1,
    )
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
        best
    )
    weights = load_file(best / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name])


# ---- disks ---------------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What libraries do when a disk is full, without a disk to fill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    make(folder).train()
    return tiny.logged(folder)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (2_000_000, "Error while serializing: .*File too large"),
        (3_000_000, "a file was cut short"),
        (100, "metrics.jsonl"),
    ],
    ids=["weights", "optimizer", "metrics"],
)
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(
    tmp_path: Path, never_stopped: list[dict[str, Any]], size: int, reason: str
) -> None:

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                limit.enter_context(files_no_larger_than(size))

    wanted = f"could not be written: .*{reason}|{reason} could"
    with ExitStack() as limit, pytest.raises(DiskError, match=wanted):
        make(tmp_path, callbacks=[Fill()]).train()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["checkpoint-1"]
    make(tmp_path).train(resume_from_checkpoint=True)
    assert tiny.logged(tmp_path) == never_stopped


@pytest.mark.parametrize(
    "error", [Exception("No space left on device (os error 28)"), RuntimeError("a fault of ours")]
)
def test_no_fault_but_the_disk_s_is_told_as_one(tmp_path: Path, error: Exception) -> None:
    """tokenizers raises a bare Exception."""
    wanted = DiskError if "os error" in str(error) else RuntimeError
    with pytest.raises(wanted) as caught, disk_errors(tmp_path / "new" / "file"):
        raise error
    assert type(caught.value) is wanted


def test_a_disk_error_tells_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the last moment, when all has been written; as on a disk that became read-only."""

    def refuse(*args: Any) -> None:
        raise OSError(30, "Read-only file system")

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                monkeypatch.setattr(Path, "rename", refuse)

    wanted = "checkpoint-2 could not be written: .*Read-only.*last good checkpoint is .*-1. Make"
    with pytest.raises(DiskError, match=wanted):
        make(tmp_path, callbacks=[Break()]).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_library_s_own_files_on_a_read_only_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's events: its error names no run and no checkpoint."""
    from torch.utils.tensorboard.writer import FileWriter

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                monkeypatch.setattr(FileWriter, "add_event", refuse)

    wanted = f"{tmp_path.name} could not be written: .*Read-only.*checkpoint is .*-1. Make room"
    with pytest.raises(DiskError, match=wanted):
        make(tmp_path, callbacks=[Break()], report_to="tensorboard").train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_final_model_is_whole_or_not_there(tmp_path: Path) -> None:
    """As if killed in its write before, and with a full disk now."""
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    kept = tmp_path / "model"
    with files_no_larger_than(1_000_000), pytest.raises(DiskError, match="model could not be wr"):
        trainer.save_whole_model(kept)
    assert not kept.exists() and not (tmp_path / STAGING).exists()
    for _ in range(2):  # the second takes the place of the first
        trainer.save_whole_model(kept)
        assert (kept / "model.safetensors").stat().st_size > 1_000_000
    assert not (tmp_path / STAGING).exists()
