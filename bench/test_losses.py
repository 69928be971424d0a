"""Each case: a shape, a task and its contenders; memory and error apart, then time in turns."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from bench.cases import Case, select, selection
from bench.contenders import CONTENDERS, GPU_ONLY, Run, find, step
from bench.floor import Floor, has_teacher
from bench.measure import Turns, probe_apart, summary
from bench.problems import SMOLLM2, Problem, make
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
    key = case.section, case.task, contender
    if key in results.absent:
        return None
    run = (absent() if case.shape.name == SMOLLM2.name else None) or find(contender, case.task)
    if isinstance(run, str):
        results.absent[key] = run
        return None
    return run


def test_memory_and_error(case: Case, contender: str, results: Results, device: str) -> None:
    """In a process of its own."""
    key = case.section, case.task, contender
    if function_of(case, contender, results) is None:
        pytest.skip(results.absent[key])
    found = probe_apart(case.shape, case.task, contender, case.dtype, device)
    if "failed" in found:
        results.absent[key] = found["failed"]
        assert contender != "ours", found
        pytest.skip(f"{contender} {found['failed']}")
    results.add(*key, found)


def problem_of(case: Case, device: str) -> tuple[Problem, Floor]:
    """A problem and the floor of a task, kept until another problem is asked for."""
    key, taught = (case.shape, case.dtype), has_teacher(case.task)
    if key not in _made:
        _made.clear()
        _made[key] = make(*key, device)
    if (key, taught) not in _made:
        _made.pop((key, not taught), None)
        _made[key, taught] = Floor(_made[key], taught)
    return _made[key], _made[key, taught]


def test_time(benchmark: Any, case: Case, results: Results, device: str, rounds: int) -> None:
    """All in one process, in turns: pytest-benchmark counts our rounds, the others' go before."""
    section, task = case.section, case.task
    runs = {name: function_of(case, name, results) for name in case.contenders}
    if runs["ours"] is None:
        pytest.skip(results.absent[section, task, "ours"])
    for name in (n for n in CONTENDERS if n not in (*case.contenders, *GPU_ONLY)):
        why = find(name, task)
        results.absent[section, task, name] = why if isinstance(why, str) else "with --all"
    x, floor = problem_of(case, device)
    steps = {name: partial(step, run, x) for name, run in runs.items() if run is not None}
    turns = Turns({"floor": floor, **steps}, device == "cuda")
    for name, why in turns.warm_up().items():
        results.absent[section, task, name] = why
    assert "ours" in turns.steps, results.absent
    others = [name for name in turns.steps if name != "ours"]
    benchmark.group = f"{section} {task}"
    benchmark.pedantic(lambda: turns.take("ours"), setup=lambda: turns.take(*others), rounds=rounds)
    x.clear()
    for name in (name for name in turns.steps if name != "floor"):
        timing = summary(turns.seconds[name], turns.seconds["floor"])._asdict()
        benchmark.extra_info[name] = timing
        results.add(section, task, name, timing)
