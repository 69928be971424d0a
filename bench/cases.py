"""Which cases a session measures: a shape, a task and its contenders.

By default about 20 minutes on two cores: the shape of Qwen2.5 beside the floor and its fastest
rival, in 128 rows where that takes long, and each task on the real states of SmolLM2. `--all` has
every contender of every case, and more shapes; it takes hours on a CPU. `--quick` has a tiny shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

from bench.contenders import CONTENDERS, GPU_ONLY, TASKS
from bench.problems import GEMMA, LLAMA, QWEN, SMOLLM2, TINY, Shape, resized

EVERYONE = tuple(CONTENDERS)


class Case(NamedTuple):
    shape: Shape
    task: str
    contenders: tuple[str, ...] = EVERYONE
    dtype: torch.dtype = torch.float32

    @property
    def section(self) -> str:
        """Of the tables."""
        return f"{self.shape}-bf16" if self.dtype == torch.bfloat16 else str(self.shape)

    def __str__(self) -> str:
        return f"{self.section}-{self.task}"


def bf16(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(case._replace(dtype=torch.bfloat16) for case in cases)


SHORT = resized(QWEN, rows=128)
DEFAULT = (
    Case(QWEN, "forward_kl", ("ours",)),
    Case(SHORT, "forward_kl", ("ours", "liger")),
    Case(SHORT, "three_signals", ("ours", "liger")),
    Case(SHORT, "jsd", ("ours",)),
    Case(SHORT, "cross_entropy", ("ours", "torch")),
    Case(SMOLLM2, "forward_kl"),
    Case(SMOLLM2, "reverse_kl", ("ours",)),
    Case(SMOLLM2, "jsd", ("ours", "trl", "liger")),
    Case(SMOLLM2, "skew_forward_kl", ("ours",)),
    Case(SMOLLM2, "total_variation", ("ours",)),
    Case(SMOLLM2, "alpha_beta", ("ours",)),
    Case(SMOLLM2, "cross_entropy"),
    Case(SMOLLM2, "log_prob", ("ours", "dense", "trl")),
    Case(SMOLLM2, "rows", ("ours", "dense")),
    *bf16([Case(resized(SMOLLM2, rows=128), "forward_kl", ("ours", "dense", "trl", "liger"))]),
)
MAIN = ("forward_kl", "three_signals", "cross_entropy")
ROUNDED = ("forward_kl", "reverse_kl", "jsd", "three_signals", "cross_entropy")
ALL = (
    *(Case(QWEN, task) for task in TASKS),
    *(Case(SHORT, task) for task in (*MAIN, "jsd")),
    *(Case(GEMMA, task) for task in ("forward_kl", "jsd", "three_signals", "cross_entropy")),
    *(Case(LLAMA, task) for task in MAIN),
    *(Case(SMOLLM2, task) for task in TASKS),
    *bf16([Case(resized(SMOLLM2, rows=128), "forward_kl")]),
    *bf16(Case(shape, task) for shape in (QWEN, SMOLLM2) for task in ROUNDED),
)
LONG = tuple(Case(resized(QWEN, rows=4096), task) for task in MAIN)  # on a GPU
QUICK = (*(Case(TINY, task) for task in TASKS), *bf16([Case(TINY, "forward_kl")]))

ROWS = (128, 256, 512, 1024, 2048, 4096)
VOCABULARIES = (16_384, 32_768, 65_536, 131_072, 262_144)


class Point(NamedTuple):
    axis: str  # rows or vocabulary: which one grows
    shape: Shape


def device_of(config: pytest.Config) -> str:
    wanted = config.getoption("--device")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def selection(config: pytest.Config) -> dict[str, bool]:
    """The options that `select` takes."""
    cuda = device_of(config) == "cuda"
    return {
        "quick": config.getoption("--quick"),
        "everything": config.getoption("--all"),
        "cuda": cuda,
    }


def select(*, quick: bool = False, everything: bool = False, cuda: bool = False) -> list[Case]:
    """On a GPU in bf16 only, what its users train in, and with our backend for it."""
    chosen = QUICK if quick else ALL if everything else DEFAULT
    if cuda:
        chosen = bf16(case for case in chosen if case.dtype == torch.float32)
        chosen += bf16(LONG) if everything else ()
    return [case._replace(contenders=_present(case.contenders, cuda)) for case in chosen]


def _present(names: tuple[str, ...], cuda: bool) -> tuple[str, ...]:
    return tuple(n for n in CONTENDERS if (cuda if n in GPU_ONLY else n in names))


def sweeps(*, quick: bool = False, everything: bool = False) -> list[Point]:
    if quick:
        return [Point("rows", resized(TINY, rows=n)) for n in (16, 32)]
    rows, vocabularies = (ROWS, VOCABULARIES) if everything else (ROWS[1:-1], VOCABULARIES[1:-1])
    return [
        *(Point("rows", resized(QWEN, n, VOCABULARIES[0])) for n in rows),
        *(Point("vocabulary", resized(QWEN, ROWS[0], v)) for v in vocabularies),
    ]
