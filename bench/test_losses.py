"""Each case: a shape, a task and its contenders; memory and error apart, then time in turns."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from bench.cases import Case, select, selection
from bench.contenders import CONTENDERS, Run, find, step
from bench.floor import Floor, has_teacher
from bench.measure import Turns, probe_apart, summary
from bench.problems import SMOLLM2, Shape, make
from bench.report import Results
from bench.smollm2 import absent

_made: dict[Any, Any] = {}  # the last problem and its floors


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = select(**selection(metafunc.config))
    if "contender" in metafunc.fixturenames:
        each = [(case, who) for case in cases for who in case.contenders]
        names = [f"{case}-{who}" for case, who in each]
        metafunc.parametrize(("case", "contender"), each, ids=names)
    else:
        metafunc.parametrize("case", cases, ids=map(str, cases))


def function_of(case: Case, contender: str, results: Results) -> Run | None:
    """None, and the reason among the results, where there is none or its memory run failed."""
    shape, task, _ = case
    if (str(shape), task, contender) in results.absent:
        return None
    run = (absent() if shape.name == SMOLLM2.name else None) or find(contender, task)
    if isinstance(run, str):
        results.absent[str(shape), task, contender] = run
        return None
    return run


def test_memory_and_error(
    case: Case, contender: str, results: Results, dtype: torch.dtype, device: str
) -> None:
    """In a process of its own."""
    shape, task, _ = case
    if function_of(case, contender, results) is None:
        pytest.skip(results.absent[str(shape), task, contender])
    found = probe_apart(shape, task, contender, str(dtype).removeprefix("torch."), device)
    if "failed" in found:
        results.absent[str(shape), task, contender] = found["failed"]
        assert contender != "ours", found
        pytest.skip(f"{contender} {found['failed']}")
    results.add(str(shape), task, contender, found)


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
    case: Case,
    results: Results,
    dtype: torch.dtype,
    device: str,
    rounds: int,
) -> None:
    """All in one process, in turns: pytest-benchmark counts our rounds, the others' go before."""
    shape, task, contenders = case
    runs = {name: function_of(case, name, results) for name in contenders}
    if runs["ours"] is None:
        pytest.skip(results.absent[str(shape), task, "ours"])
    x, floor = problem_of(shape, task, dtype, device)
    steps = {name: partial(step, run, x) for name, run in runs.items() if run is not None}
    for name in (name for name in CONTENDERS if name not in contenders):
        why = find(name, task)
        results.absent[str(shape), task, name] = why if isinstance(why, str) else "with --all"
    turns = Turns({"floor": floor, **steps}, device == "cuda")
    for name, why in turns.warm_up().items():
        results.absent[str(shape), task, name] = why
    assert "ours" in turns.steps, results.absent
    others = [name for name in turns.steps if name != "ours"]
    benchmark.group = f"{shape} {task}"
    benchmark.pedantic(lambda: turns.take("ours"), setup=lambda: turns.take(*others), rounds=rounds)
    x.clear()
    for name in (name for name in turns.steps if name != "floor"):
        timing = summary(turns.seconds[name], turns.seconds["floor"])._asdict()
        benchmark.extra_info[name] = timing
        results.add(str(shape), task, name, timing)
