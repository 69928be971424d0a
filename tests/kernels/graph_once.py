"""For test_capture.py, on a GPU: each function captured in a CUDA graph, and replayed on a batch
with other numbers and other ignored rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import error
from test_capture import CALLS, IGNORED, ON_GPU_ONLY, Problem, make, total
from torch import Tensor

OTHERS = [1, 2, 12]  # ignored in the second batch
MAX_ERROR = 1e-3  # left out or zeroed, rows meet other GEMMs; the first batch is 0.6 away
LAUNCHES = 3  # before the capture: kernels are compiled, GEMMs get their workspace


def values(call: Callable[..., Any], p: Problem, backend: str) -> list[Tensor]:
    results = call(p, backend=backend)
    gradients = torch.autograd.grad(total(results), p.inputs)
    return [r.detach() for r in results] + list(gradients)


@torch.no_grad()
def next_batch(p: Problem) -> None:
    """Into the same memory."""
    for hidden in (p.student, p.teacher):
        hidden[IGNORED] = torch.randn_like(hidden[IGNORED])
        hidden[OTHERS] = torch.nan
    p.targets[IGNORED] = 1
    p.targets[OTHERS] = -100
    p.weight.mul_(0.5)


def check(call: Callable[..., Any], backend: str) -> float:
    """The largest error of a replay."""
    p, side = make("cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(LAUNCHES):
            values(call, p, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = values(call, p, backend)
    next_batch(p)
    graph.replay()
    return max(error(a, b) for a, b in zip(replayed, values(call, p, backend), strict=True))


def main() -> None:
    for backend in ("torch", "triton"):
        for name, call in (CALLS | ON_GPU_ONLY).items():
            found = check(call, backend)
            print(f"{backend} {name}: {found:.1e}", flush=True)
            assert found < MAX_ERROR, name


if __name__ == "__main__":
    main()
