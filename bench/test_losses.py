"""Each case: a shape, a task and a contender; time beside the floor, memory and error apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.contenders import CONTENDERS, TASKS, find, step
from bench.floor import Floor, has_teacher
from bench.measure import finished, probe_apart, seconds, summary
from bench.problems import GEMMA, LLAMA, QWEN, SMOLLM2, TINY, Shape, make
from bench.report import Results
from bench.smollm2 import absent

EVERY = tuple(CONTENDERS)
CASES: list[tuple[Shape, str, tuple[str, ...]]] = [
    *((QWEN, task, EVERY) for task in ("forward_kl", "jsd", "three_signals", "cross_entropy")),
    *((QWEN, task, ("ours",)) for task in ("reverse_kl", "total_variation", "alpha_beta", "rows")),
    (QWEN, "skew_forward_kl", ("ours", "orda")),
    (GEMMA, "forward_kl", ("ours", "dense", "trl", "liger")),
    (GEMMA, "three_signals", ("ours", "trl", "liger")),
    (LLAMA, "forward_kl", ("ours", "liger")),
    (SMOLLM2, "forward_kl", EVERY),
]
FULL = [(shape, task, who) for shape, task, contenders in CASES for who in contenders]
QUICK = [(TINY, task, who) for task in TASKS for who in EVERY]

_made: dict[Any, Any] = {}  # the last problem and its floor


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = QUICK if metafunc.config.getoption("--quick") else FULL
        names = ["-".join((str(shape), task, who)) for shape, task, who in cases]
        metafunc.parametrize("case", cases, ids=names)


@pytest.fixture
def contender(case: Any, results: Results) -> Any:
    """The function of a case, or a skip that says why there is none."""
    shape, task, name = case
    why = absent() if shape is SMOLLM2 else None
    run = find(name, task)
    if why is None and isinstance(run, str):
        why = run
    if why is not None:
        results.absent[str(shape), task, name] = why
        pytest.skip(f"{name}: {why}")
    return run


def problem_of(shape: Shape, task: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """A problem and the floor of a task, kept until another problem is asked for."""
    key, taught = (shape, dtype, device), has_teacher(task)
    if key not in _made:
        _made.clear()
        _made[key] = make(shape, dtype, device)
    if (key, taught) not in _made:
        _made.pop((key, not taught), None)
        _made[key, taught] = Floor(_made[key], taught)
    return _made[key], _made[key, taught]


def test_time(
    benchmark: Any,
    case: Any,
    contender: Any,
    results: Results,
    dtype: torch.dtype,
    device: str,
    request: pytest.FixtureRequest,
) -> None:
    shape, task, name = case
    x, floor = problem_of(shape, task, dtype, device)
    option = "--rounds" if name == "ours" else "--peer-rounds"
    rounds = 1 if request.config.getoption("--quick") else request.config.getoption(option)
    cuda, before = device == "cuda", []
    run, base = finished(lambda: step(contender, x), cuda), finished(floor, cuda)
    benchmark.group = f"{shape} {task}"
    benchmark.pedantic(
        run, setup=lambda: before.append(seconds(base)), rounds=rounds, warmup_rounds=1
    )
    x.clear()
    timing = summary(benchmark.stats.stats.data, before[-rounds:])
    benchmark.extra_info.update(timing._asdict())
    results.add(str(shape), task, name, timing._asdict())


def test_memory_and_error(
    case: Any, contender: Any, results: Results, dtype: torch.dtype, device: str
) -> None:
    """In a process of its own."""
    shape, task, name = case
    _made.clear()
    found = probe_apart(shape, task, name, str(dtype).removeprefix("torch."), device)
    results.add(str(shape), task, name, found)
    assert name != "ours" or "failed" not in found, found
    if "failed" in found:
        pytest.skip(f"{name} failed: {found['failed']}")
