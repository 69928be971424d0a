"""How time and workspace grow with N and with V, one of them at a time."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.contenders import find, step
from bench.measure import probe_apart, seconds
from bench.problems import QWEN, TINY, Shape, make, resized
from bench.report import Results

ROWS = (128, 256, 512, 1024, 2048, 4096)
VOCABULARIES = (16_384, 32_768, 65_536, 131_072, 262_144)
SWEEPS = [("rows", QWEN, 32_768, n) for n in ROWS] + [
    ("vocabulary", QWEN, v, 256) for v in VOCABULARIES
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    sweeps = [("rows", TINY, 3000, n) for n in (16, 32)] if quick else SWEEPS
    metafunc.parametrize("sweep", sweeps, ids=[f"{a}-{n}x{v}" for a, _, v, n in sweeps])


@pytest.mark.parametrize("contender", ["ours"])
def test_scaling(
    sweep: tuple[str, Shape, int, int],
    contender: str,
    results: Results,
    dtype: torch.dtype,
    device: str,
) -> None:
    axis, base, vocabulary, rows = sweep
    shape = resized(base, rows, vocabulary)
    run = find(contender, "forward_kl")
    assert not isinstance(run, str)
    x = make(shape, dtype, device)
    step(run, x)
    times = [seconds(lambda: step(run, x), device == "cuda") for _ in range(5)]
    found = probe_apart(shape, "forward_kl", contender, str(dtype).removeprefix("torch."), device)
    point = {"rows": rows, "vocabulary": vocabulary, "seconds": statistics.median(times)}
    results.sweeps[axis, contender].append(point | found)
