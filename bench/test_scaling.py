"""How time and workspace grow with N and with V, one of them at a time."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.cases import Point, selection, sweeps
from bench.contenders import GPU_ONLY, find, step
from bench.measure import probe_apart, seconds
from bench.problems import make
from bench.report import Results


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = selection(metafunc.config)
    ours = ["ours", *GPU_ONLY] if chosen.pop("cuda") else ["ours"]
    points = sweeps(**chosen)
    metafunc.parametrize("contender", ours)
    names = [f"{axis}-{shape.rows}x{shape.vocab_size}" for axis, shape in points]
    metafunc.parametrize("point", points, ids=names)


def test_scaling(
    point: Point,
    contender: str,
    results: Results,
    dtype: torch.dtype,
    device: str,
    rounds: int,
) -> None:
    axis, shape = point
    run = find(contender, "forward_kl")
    if isinstance(run, str):
        pytest.skip(run)
    found = probe_apart(shape, "forward_kl", contender, dtype, device)
    if "failed" in found:
        assert contender in GPU_ONLY, found
        pytest.skip(found["failed"])
    x = make(shape, dtype, device)
    step(run, x)
    times = [seconds(lambda: step(run, x), device == "cuda") for _ in range(rounds)]
    size = {"rows": shape.rows, "vocabulary": shape.vocab_size}
    results.sweeps[axis, contender].append(size | {"seconds": statistics.median(times)} | found)
