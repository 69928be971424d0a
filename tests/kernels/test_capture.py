"""While a CUDA graph is captured, nothing waits for the device, and the results are the same.

Without a GPU "meta" stands for one: its tensors hold nothing, so that whatever reads one raises,
and a mode refuses copies between it and the host.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKENDS, error, make_side, make_targets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dudi_kernels import (
    LMHead,
    LoRA,
    TopKTeacher,
    compiled,
    devices,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
    prepare,
    recompute,
    sequence_log_prob,
    sweep,
    three_signals,
)
from dudi_kernels.backends import gemms, native
from dudi_kernels.backends.native import gemm
from dudi_kernels.divergences import DIVERGENCES

ROWS, VOCAB, WIDTH, RANK = 24, 301, 16, 2
IGNORED = [0, 7, 8, 23]
LENGTHS = torch.tensor([5, 7, 9, 3])
SMALL = 200_000  # bytes: several chunks
META = torch.device("meta")
WAYS = [("torch", "retain"), ("triton", "retain"), ("triton", "recompute")]  # scalars go


@pytest.fixture(autouse=True)
def _steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain: what a GPU runs."""
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(gemm, "library", lambda: None)


@dataclass
class Problem:
    """Inputs of every function; ignored rows hold NaN."""

    student: Tensor
    head: LMHead
    teacher: Tensor
    teacher_head: LMHead
    top: TopKTeacher
    targets: Tensor
    weight: Tensor
    segments: Tensor
    host_segments: Tensor  # the same on the CPU
    counts: tuple[Tensor, Tensor, Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        lora, bias = self.head.lora, self.head.bias
        assert lora is not None and bias is not None
        return [self.student, self.head.weight, bias, lora.a, lora.b]


def make(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    student = make_side(ROWS, VOCAB, WIDTH, dtype, bias=True)
    teacher = make_side(ROWS, VOCAB, 20, dtype, bias=True, seed=3)
    with torch.no_grad():
        for side in (student, teacher):
            assert side.bias is not None
            side.bias[5] = -torch.inf
        top = teacher.logits().float().log_softmax(-1).topk(4)
        for hidden in (student.hidden, teacher.hidden):
            hidden[IGNORED] = torch.nan
    targets = make_targets(ROWS, VOCAB)
    targets[targets == 5] = 6
    targets[IGNORED] = -100

    def on(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device)

    def leaf(tensor: Tensor) -> Tensor:
        return on(tensor).requires_grad_()

    lora = LoRA(leaf(torch.randn(RANK, WIDTH, dtype=dtype)), leaf(torch.randn(VOCAB, RANK)), 0.5)
    with mock.patch.object(TopKTeacher, "__post_init__", lambda self: None):
        known = TopKTeacher(on(top.indices), on(top.values))
    return Problem(
        leaf(student.hidden),
        LMHead(leaf(student.weight), leaf(student.bias), 5.0, 0.8, lora),
        on(teacher.hidden),
        LMHead(on(teacher.weight), on(teacher.bias)),
        known,
        on(targets),
        on(torch.rand(ROWS)),
        on(segments := torch.arange(4).repeat_interleave(LENGTHS)),
        segments,
        (on(torch.tensor(40.0)), on(torch.tensor(50.0)), on(torch.tensor(2.0))),
    )


def distill_loss(divergence: str, **settings: Any) -> Callable[..., Any]:
    def call(p: Problem, **more: Any) -> Any:
        sides = p.student, p.head, p.teacher, p.teacher_head
        given = {"targets": p.targets, "divergence": divergence, **settings, **more}
        return linear_distill_loss(*sides, **given)

    return call


def distill(divergence: str) -> Callable[..., Any]:
    def call(p: Problem, **more: Any) -> Any:
        sides = p.student, p.head, p.teacher, p.teacher_head
        return linear_distill(*sides, targets=p.targets, divergence=divergence, **more)

    return call


def cross_entropy(reduction: Any) -> Callable[..., Any]:
    return lambda p, **more: (
        linear_cross_entropy(p.student, p.head, p.targets, reduction=reduction, **more),
    )


def dudi(p: Problem, few: bool = False, **more: Any) -> Any:
    off, on, pairs = p.counts
    teacher = p.top if few else p.teacher.nan_to_num()
    return linear_dudi_loss(
        p.student.nan_to_num(),
        p.head,
        teacher,
        None if few else p.teacher_head,
        p.targets.clamp(min=0),
        p.host_segments,
        preference_weight=0.3,
        preference_length_power=1,
        ce_weight=0.2,
        on_policy_divergence="jsd",
        off_policy_rows=off,
        on_policy_rows=on,
        pairs=pairs,
        **{"reference_log_prob": "teacher"} | more,
    )


def sequences(p: Problem, segments: Tensor, **more: Any) -> tuple[Tensor]:
    return (sequence_log_prob(p.student, p.head, p.targets, segments, **more),)


CALLS: dict[str, Callable[..., Any]] = {
    **{f"distill_loss-{name}": distill_loss(name, ce_weight=0.3) for name in DIVERGENCES},
    "distill_loss-weighted": lambda p, **more: distill_loss("jsd", temperature=1.5)(
        p, token_weight=p.weight, **more
    ),
    **{f"distill-{name}": distill(name) for name in ("forward_kl", "jsd", "adaptive_kl")},
    "top_k": lambda p, **more: linear_distill_loss(
        p.student, p.head, p.top, targets=p.targets, ce_weight=0.3, **more
    ),
    **{f"cross_entropy-{name}": cross_entropy(name) for name in ("mean", "sum", "none")},
    "log_prob": lambda p, **more: (
        linear_log_prob(p.student, p.head, p.targets, temperature=0.7, **more),
    ),
    "sequence_log_prob": lambda p, **more: sequences(p, p.segments, num_segments=5, **more),
}
ON_GPU_ONLY: dict[str, Callable[..., Any]] = {
    "sequence_log_prob-ids on the CPU": lambda p, **more: sequences(p, p.host_segments, **more),
    "dudi": dudi,
    "dudi-top_k": lambda p, **more: dudi(p, few=True, reference_log_prob=None, **more),
    "dudi-adaptive_kl": lambda p, **more: dudi(p, off_policy_divergence="adaptive_kl", **more),
    "dudi-reference": lambda p, **more: dudi(
        p, reference_log_prob=torch.zeros(4, device=p.student.device), **more
    ),
}


def total(results: Any) -> Tensor:
    """Of everything that is differentiable."""
    return torch.stack([r.sum() for r in results if r.requires_grad]).sum()


# ---- nothing waits -------------------------------------------------------------------------------

COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.where)


class NoCopies(TorchDispatchMode):
    """Refuses what moves data between the host and the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if len({t.device for t in tensors}) > 1:
            numbers = all(t.ndim == 0 for t in tensors if t.device.type == "cpu")
            if func.overloadpacket in COPIES or not numbers:  # else a kernel's argument
                raise RuntimeError(f"{func} moves data between the host and the meta device")
        return out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in; `state.asked` are the answers to whether it is capturing, of which the number
    `state.lie` is wrong."""
    state = SimpleNamespace(asked=[], lie=None, launched=[])

    def capturing(device: torch.device) -> bool:
        if device != META:
            return False
        state.asked.append(len(state.asked) != state.lie)
        return state.asked[-1]

    monkeypatch.setattr(devices, "capturing", capturing)
    monkeypatch.setattr(prepare, "GPUS", ("meta",))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    for module in (sweep, recompute):  # torch has no autocast on meta
        monkeypatch.setattr(module, "no_autocast", lambda device: nullcontext())
    monkeypatch.setattr(gemms, "_gemm_dtype", lambda device, dtype, backward: dtype)
    return state


def prepare_backend(backend: str, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "triton":
        return
    import dudi_kernels.backends.triton as triton_backend
    from dudi_kernels.backends.triton import launch

    def run(device, kernel, grid, **arguments):
        tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
        assert all(t.device == device == META for t in tensors)
        gpu.launched.append(kernel)

    monkeypatch.setattr(triton_backend, "GPUS", ("meta",))
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "target_of", lambda device: launch.Target("cuda", 80, 108))


def step(call: Callable[..., Any], p: Problem, backend: str) -> None:
    """Forward and backward; every input gets its gradient."""
    with NoCopies():
        total(call(p, backend=backend)).backward()
    assert all(t.grad is not None and t.grad.device == META for t in p.inputs)


@pytest.mark.parametrize(("backend", "strategy"), WAYS)
@pytest.mark.parametrize("name", [*CALLS, *ON_GPU_ONLY])
def test_nothing_waits_for_the_device(name, strategy, backend, gpu, monkeypatch):
    """And each time that the library asks whether it may wait, it would have."""
    prepare_backend(backend, gpu, monkeypatch)
    monkeypatch.setattr(prepare, "prefers_recompute", lambda *shape: strategy == "recompute")
    call = (CALLS | ON_GPU_ONLY)[name]
    for dtype in (torch.float32, torch.bfloat16):
        step(call, make(META, dtype), backend)
    assert (backend == "triton") == bool(gpu.launched)
    asked, gpu.asked = len(gpu.asked) // 2, []
    for gpu.lie in range(asked):
        gpu.asked.clear()
        with pytest.raises(RuntimeError, match="meta"):
            step(call, make(META), backend)


# ---- the same results ----------------------------------------------------------------------------


@contextmanager
def captured(yes: bool = True):
    with mock.patch.object(devices, "capturing", lambda device: yes):
        yield


def run(call: Callable[..., Any], backend: str, yes: bool, **settings: Any) -> list[Tensor]:
    torch.manual_seed(1)
    p = make()
    with captured(yes):
        results = call(p, backend=backend, memory_budget=SMALL, **settings)
        total(results).backward()
    gradients = [t.grad for t in p.inputs]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    return [r.detach() for r in results] + [g for g in gradients if g is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_zeros_in_the_place_of_ignored_rows(name, backend):
    left_out, zeroed = (run(CALLS[name], backend, yes) for yes in (False, True))
    for a, b in zip(left_out, zeroed, strict=True):
        assert error(b, a) < 2e-6
        if len(b.shape) and len(b) == ROWS:  # a result, or the gradient of the hidden states
            assert not b[IGNORED].any() and not b.isnan().any()


def test_all_rows_ignored():
    p = make()
    with captured():
        loss = linear_cross_entropy(p.student, p.head, torch.full((ROWS,), -100))
        loss.backward()
    assert loss == 0
    assert all(t.grad is not None and not t.grad.any() for t in p.inputs)


def test_three_signals_with_denominators_on_the_device(monkeypatch):
    """Where sequences start is known. A denominator of 0 divides nothing."""
    segments = make().segments
    left = three_signals._packing(segments, segments.device, None, 1)
    monkeypatch.setattr(three_signals, "_packing", lambda *given: left)
    for a, b in zip(*(run(dudi, "torch", yes) for yes in (False, True)), strict=True):
        assert error(b, a) < 2e-6
    with captured():
        assert three_signals._denominator("pairs", torch.tensor(0), 2) == 1


def test_segment_ids_from_the_host():
    other = torch.device("cpu", 0)  # another name of the CPU: ids are made there
    for ids in (torch.tensor([0, 0, 2, 3, 3, 3, 7]), torch.zeros(0, dtype=torch.long)):
        made = prepare.on_device(ids, other)
        assert torch.equal(made, ids) and made is not ids and made.dtype == ids.dtype
        assert prepare.on_device(ids, ids.device) is ids


# ---- what a capture can't have -------------------------------------------------------------------


def test_refusals_under_capture():
    p = make()
    with captured():
        with pytest.raises(ValueError, match="segment_ids must be on the CPU while"):
            dudi(p)
        with pytest.raises(ValueError, match="num_segments must be given while"):
            sequences(p, p.segments)
        with pytest.raises(ValueError, match=r"targets must have shape \(24,\), got \(23,\)"):
            linear_log_prob(p.student, p.head, p.targets[1:])
        with pytest.raises(ValueError, match="divergence must be one of"):
            distill_loss("kl")(p)


def test_a_reference_on_the_host(gpu):
    p = make(META)
    with pytest.raises(ValueError, match="reference_log_prob must be on meta as"):
        dudi(p, reference_log_prob=torch.zeros(4), backend="torch")


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that captures CUDA graphs")
def test_graphs_are_captured_and_replayed():
    """In another process: here the kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("graph_once.py")
    subprocess.run([sys.executable, str(script)], env=environment, check=True)


# ---- devices and streams -------------------------------------------------------------------------


class Entered:
    """A context that tells whether it is entered."""

    def __init__(self, what: object, log: list):
        self.what, self.log = what, log

    def __enter__(self) -> None:
        self.log.append(self.what)

    def __exit__(self, *error: object) -> None:
        self.log.remove(self.what)


@pytest.mark.parametrize("kind", devices.GPUS)
def test_a_launch_is_on_the_device_of_its_tensors(kind, monkeypatch):
    launch = pytest.importorskip("dudi_kernels.backends.triton.launch")
    log: list[Any] = []
    monkeypatch.setattr(getattr(torch, kind), "device", lambda device: Entered(device, log))
    device, seen = torch.device(kind, 1), []
    kernel = {(2, 3): lambda **arguments: seen.append((list(log), arguments))}
    launch.run(device, kernel, (2, 3), rows=4)
    assert seen == [([device], {"rows": 4})] and not log
    launch.run(torch.device("cpu"), kernel, (2, 3), rows=4)
    assert seen[1] == ([], {"rows": 4})


@pytest.mark.parametrize("kind", devices.GPUS)
def test_an_operator_works_on_the_stream_of_its_caller(kind, monkeypatch):
    log: list[Any] = []
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(module, "stream", lambda stream: Entered(stream, log))
    seen: list[Any] = []

    def work() -> list[Tensor]:
        seen.extend(log)
        return []

    compiled._apart(work, torch.device(kind, 1))
    assert seen == [f"stream of {kind}:1"] and not log


@pytest.mark.parametrize("kind", devices.GPUS)
def test_whether_a_graph_is_captured(kind, monkeypatch):
    module = getattr(torch, kind)
    assert not devices.capturing(torch.device("cpu"))
    monkeypatch.setattr(module, "is_current_stream_capturing", lambda: True, raising=False)
    assert devices.capturing(torch.device(kind, 0))
    monkeypatch.delattr(module, "is_current_stream_capturing")  # as in older versions of xpu
    assert not devices.capturing(torch.device(kind, 0))
