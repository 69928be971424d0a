"""`pytest bench/` runs and writes its results, without any other library installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import smollm2
from bench.cases import ALL, DEFAULT, select, sweeps
from bench.contenders import KD
from bench.measure import Turns, in_a_word, seconds
from bench.problems import QWEN, SMOLLM2
from bench.report import BOTH, ERROR, SPACE, SPEED, TIME, Results, table, targets

ROOT = Path(__file__).parents[1]


def test_a_quick_session(tmp_path: Path) -> None:
    chosen = "forward_kl and not skew or topk or rollout"
    words = ("bench", "--quick", "-q", "-k", chosen, "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--results", str(tmp_path)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},  # -n is not its
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    cases = {(c["shape"], c["contender"]): c for c in summary["cases"]}
    for shape in ("tiny-48", "tiny-48-bf16"):
        assert {(shape, "ours"), (shape, "dense")} <= cases.keys()
    for case in cases.values():
        rounded = case["dtype"] == "bfloat16"  # gradients in bf16, and the logits of some
        assert case["ratio"] > 0 and case["peak_bytes"] > 0
        assert 1e-3 < case["gradient_error"] < 1e-1 if rounded else case["gradient_error"] < 1e-5
    written = (tmp_path / "table.md").read_text()
    assert "| forward_kl | **ours** |" in written
    assert {line["verdict"] for line in summary["targets"]} <= {"met", "missed", ""}
    assert "| both divergences | 48 |" in written and "## samples, tokens a second" in written
    assert "## Targets" in written and "## Targets" in done.stdout
    assert "| tiny-48-bf16 | ours | dense |" in (tmp_path / "readme.md").read_text()
    assert "| forward_kl | cut-cross-entropy, torch | has no such loss |" in written


def test_real_states_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def compute(rows: int) -> tuple[torch.Tensor, ...]:
        made.append(rows)
        return (torch.arange(rows),) * 4

    monkeypatch.setattr(smollm2, "_computed", compute)
    monkeypatch.setenv(smollm2.CACHE, str(tmp_path))
    first, again = smollm2.real_states(3), smollm2.real_states(3)
    assert made == [3] and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_all_take_turns() -> None:
    seen: list[str] = []

    def refuse() -> None:
        raise ValueError("no such shape\nand more")

    steps = {name: partial(seen.append, name) for name in ("floor", "ours")}
    turns = Turns({**steps, "other": refuse}, cuda=False)
    assert turns.warm_up() == {"other": "refuses: no such shape"}
    for _ in range(2):
        turns.take(*turns.steps)
    assert seen == ["floor", "ours"] * 3
    assert [len(times) for times in turns.seconds.values()] == [2, 2, 0]


def test_a_failure_is_a_word_in_the_table() -> None:
    assert in_a_word("torch.OutOfMemoryError: CUDA out of memory. Tried 1 GiB") == "out of memory"
    assert in_a_word("RuntimeError: [enforce] DefaultCPUAllocator: can't allocate memory: 9") == (
        "out of memory"
    )
    assert in_a_word("RuntimeError: broken | odd") == "fails: broken / odd"
    results = Results()
    results.absent["big", "jsd", "orda"] = "out of memory"
    assert "| jsd | orda | out of memory | | | |" in table(results)


def test_the_default_session_has_every_task() -> None:
    assert len(select()) == len(DEFAULT) and len(select(everything=True)) == len(ALL)
    tasks = {case.task for case in DEFAULT}
    left_out = {"skew_reverse_kl", "jeffreys"}  # as their siblings
    assert {*KD, "cross_entropy", "log_prob", "three_signals", "rows"} - left_out <= tasks
    assert any(case.shape == QWEN and case.task == "forward_kl" for case in DEFAULT)
    for case in DEFAULT:
        assert "ours" in case.contenders
        assert any((str(case), case.shape) == (str(other), other.shape) for other in ALL)
    rounded = {case.shape: case.contenders for case in DEFAULT if case.dtype == torch.bfloat16}
    assert {shape.name for shape in rounded} == {SMOLLM2.name}
    assert all({"ours", "dense", "trl", "liger"} <= set(who) for who in rounded.values())
    assert set(sweeps()) < set(sweeps(everything=True))


def test_a_gpu_has_bf16_and_both_backends() -> None:
    for case in select(everything=True, cuda=True):
        assert case.dtype == torch.bfloat16 and {"ours", "ours-triton"} <= set(case.contenders)
    names = [str(case) for case in select(everything=True, cuda=True)]
    assert len(names) == len(set(names)) and "qwen2.5-4096-bf16-forward_kl" in names
    assert not any("ours-triton" in case.contenders for case in select(everything=True))


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", partial(calls.append, "wait"))
    assert seconds(partial(calls.append, "run"), cuda=True) == 1.5
    assert calls == ["wait", "record", "run", "record", "wait"]


def test_no_gpu_is_an_error_where_one_is_asked_for() -> None:
    words = ("bench", "--device", "cuda", "-q", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *words, "--collect-only"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "torch finds no GPU" in done.stdout + done.stderr


def test_targets_are_met_or_missed() -> None:
    results = Results()
    for task, ratio in (("forward_kl", 1.0), ("three_signals", 1.5)):
        own = {"ratio": ratio, "peak_bytes": 2e8, "gradient_bytes": 1e8, "gradient_error": 1e-6}
        results.add("big", task, "ours", own | {"dtype": "float32"})
    results.add("big", "forward_kl", "dense", {"ratio": 1.8, "gradient_error": 1e-7})
    results.add("big", "forward_kl", "liger", {"ratio": 1.5})
    found = {(line["task"], line["figure"]): line for line in targets(results)}
    verdicts = {key: (line["value"], line["verdict"]) for key, line in found.items()}
    assert verdicts["forward_kl", TIME] == (1.0, "met")
    assert verdicts["three_signals", TIME] == (1.5, "missed")
    assert verdicts["forward_kl", SPEED] == (1.5, "met")
    assert verdicts["three_signals", BOTH] == (1.5, "missed")
    assert verdicts["forward_kl", SPACE] == (0.373, "met")
    assert verdicts["forward_kl", ERROR] == (1e-6, "met")
    assert ("three_signals", SPEED) not in found
