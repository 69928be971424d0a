"""Measuring: paired rounds for time, a process of its own for memory and error.

Time (pytest-benchmark): the floor and all contenders of a case take turns, in the same order in
each round, so that a machine whose speed drifts moves all; the figure is the median of the rounds'
ratios. Memory and
error: `python -m bench.measure` in a fresh process, which prints JSON: the peak of resident bytes
(of the allocator's on a GPU) above what was there before the call, and the error of the gradients
against float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bench.contenders import find, reference, step, wide
from bench.problems import BY_NAME, Problem, Shape, make, resized

ERROR_ROWS = 32  # rows of the float64 comparison: the whole would not fit


class Timing(NamedTuple):
    seconds: float  # median
    floor_seconds: float
    ratio: float  # median of the rounds' own
    spread: float  # (third - first quartile) / median of the ratios
    rounds: int


def seconds(
    function: Callable[[], None], cuda: bool, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Of one call; on a GPU between two events in its stream, else by the clock."""
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()  # nothing else is under way
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = clock()
    function()
    return clock() - started


class Turns:
    """Functions that are timed one after the other, round by round.

    clock: `time.process_time` counts the CPU's seconds, of all threads, whoever else is busy.
    """

    def __init__(
        self,
        steps: Mapping[str, Callable[[], None]],
        cuda: bool,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.steps, self.cuda, self.clock = dict(steps), cuda, clock
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}

    def warm_up(self) -> dict[str, str]:
        """A call of each; who can't is out, and why, in a word."""
        failed = {}
        for name, function in self.steps.items():
            try:
                function()
            except Exception as error:  # whatever a library raises
                first = (str(error).splitlines() or [""])[0]
                failed[name] = in_a_word(f"{type(error).__name__}: {first}")
        for name in failed:
            del self.steps[name]
        return failed

    def take(self, *names: str) -> None:
        for name in names:
            self.seconds[name].append(seconds(self.steps[name], self.cuda, self.clock))


def summary(own: Sequence[float], floor: Sequence[float]) -> Timing:
    """Of the seconds of a contender's rounds and the floor's in the same rounds."""
    times = list(zip(own, floor, strict=True))
    ratios = sorted(mine / base for mine, base in times)
    quarter = len(ratios) // 4
    middle = median(ratios)
    return Timing(
        median(own),
        median(floor),
        middle,
        (ratios[-1 - quarter] - ratios[quarter]) / middle,
        len(times),
    )


# ---- memory and error ----------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes of a field of this process's status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_bytes(function: Callable[[], None], cuda: bool) -> int:
    """The most memory during the call above what was there before."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gradient_bytes(x: Problem) -> int:
    return sum(t.numel() * t.element_size() for t in (x.hidden, x.weight))


def _error(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    return float((got.double() - want).norm() / want.norm())


def gradient_error(task: str, contender: str, x: Problem) -> float:
    """The larger of the relative errors of the gradients of hidden states and weight."""
    run = find(contender, task)
    assert not isinstance(run, str)
    few = x.rows(min(ERROR_ROWS, len(x.hidden)))
    step(run, few)
    true = wide(few)
    reference(task, true).backward()
    return max(_error(few.hidden.grad, true.hidden.grad), _error(few.weight.grad, true.weight.grad))


def probe(shape: Shape, task: str, contender: str, dtype: torch.dtype, device: str) -> dict:
    """What a process of its own measures."""
    run = find(contender, task)
    assert not isinstance(run, str)
    x = make(shape, dtype, device)
    small = make(resized(BY_NAME["tiny"], rows=8), dtype, device)
    step(run, small)  # libraries are loaded and threads are there
    cuda = device != "cpu"
    peak = peak_bytes(lambda: step(run, x), cuda)
    x.clear()
    return {
        "peak_bytes": peak,
        "gradient_bytes": gradient_bytes(x),
        "gradient_error": gradient_error(task, contender, x),
        "dtype": _name(dtype),
    }


def probe_apart(shape: Shape, task: str, contender: str, dtype: torch.dtype, device: str) -> dict:
    """`probe` in a fresh process; {"failed": why, in a word} where it did not end well."""
    words = (shape.name, shape.rows, shape.vocab_size, task, contender, _name(dtype), device)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.measure", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return {"failed": in_a_word((done.stderr.strip().splitlines() or ["killed"])[-1])}
    return json.loads(done.stdout.strip().splitlines()[-1])


NO_MEMORY = ("out of memory", "outofmemory", "not enough memory", "allocate memory", "killed")
REFUSALS = ("ValueError", "TypeError", "NotImplementedError", "AssertionError")
MESSAGE = 80  # characters that a table has room for


def in_a_word(error: str) -> str:
    """Why a contender has no figure, from `Kind: message`."""
    if any(sign in error.lower() for sign in NO_MEMORY):
        return "out of memory"
    kind, _, message = error.partition(": ")
    verb = "refuses" if kind in REFUSALS else "fails"
    return f"{verb}: {message or kind}"[:MESSAGE].replace("|", "/")


def main(words: list[str]) -> None:
    name, rows, vocab, task, contender, dtype, device = words
    shape = resized(BY_NAME[name], int(rows), int(vocab))
    print(json.dumps(probe(shape, task, contender, getattr(torch, dtype), device)))


if __name__ == "__main__":
    main(sys.argv[1:])
