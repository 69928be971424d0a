"""What only the Triton backend has: splits, descriptors, wide strides, and where it can't run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import error, make_side, make_targets

pytest.importorskip("triton", reason="triton is not installed")

import dudi_kernels.backends.triton as triton_backend
from dudi_kernels import LMHead, linear_distill, prepare
from dudi_kernels.backends.triton import kernels, launch
from dudi_kernels.backends.triton.launch import Launcher, Sides, Source
from dudi_kernels.divergences import DIVERGENCES
from dudi_kernels.sweep import Side as SweepSide
from dudi_kernels.tiles import RowState, Setting

ROWS, VOCAB, WIDTH = 70, 2500, 32


@pytest.fixture(autouse=True)
def _steps() -> None:
    """Neither the compiled steps nor the plain ones."""


def per_row(dtype=torch.float32, **settings):
    """Values and gradients of `linear_distill`."""
    student, teacher = make_side(ROWS, VOCAB, WIDTH, dtype), make_side(ROWS, VOCAB, 48, dtype)
    targets = make_targets(ROWS, VOCAB)
    got = linear_distill(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        targets=targets,
        backend="triton",
        **settings,
    )
    (got.divergence.sum() + got.log_prob.sum() + got.entropy.sum()).backward()
    return [*got, *(t.grad for t in student.inputs)]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_forward_kl"])
def test_splits_of_the_vocabulary(divergence, monkeypatch):
    """Each tile its own program, or one program for all: equal but for rounding."""
    found = []
    for waves in (1, 1000):
        monkeypatch.setattr(launch, "WAVES", waves)
        found.append(per_row(divergence=divergence))
        again = per_row(divergence=divergence)
        assert all(torch.equal(a, b) for a, b in zip(found[-1], again, strict=True))
    assert launch.splits(3, 100, 1) == (100, 1)
    assert all(error(a, b) <= 1e-6 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}], ids=["plain", "tempered"])
def test_more_splits_than_are_read_at_once(settings, monkeypatch):
    """The partial results of the last few are beside what isn't there."""
    one = per_row(divergence="reverse_kl", **settings)
    blocks = launch.Blocks(128, 128, 64, 4, 1)  # 20 tiles
    monkeypatch.setattr(launch, "fused_blocks", lambda *arguments: blocks)
    monkeypatch.setattr(launch, "WAVES", 1000)
    many = per_row(divergence="reverse_kl", **settings)
    assert -(-VOCAB // blocks.columns) % kernels.SPLITS.value
    assert all(error(a, b) <= 1e-6 for a, b in zip(many, one, strict=True))


def test_blocks_fit_the_wider_side(monkeypatch):
    """A teacher in fp32 takes twice the shared memory of a student in bf16."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    target = launch.Target("cuda", 90, 132)
    monkeypatch.setattr(launch, "target_of", lambda device: target)
    half, wide = (make_side(4, 64, 32, dtype) for dtype in (torch.bfloat16, torch.float32))
    state, setting = RowState.fresh(torch.ones(4)), Setting(64, None, 1.0, 1.0, None, 1.0, False, 1)
    for sides in ((half, wide), (wide, half)):
        student, teacher = (Source.of(SweepSide(s.hidden, s.head.detach(), None)) for s in sides)
        own = Launcher(setting, state, Sides(student, teacher), 4, 64)
        assert own.tile() == launch.fused_blocks(target, torch.float32, 3)[:2]
        assert own._common(True, own._blocks(None))["PRECISION"] == "ieee"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_are_the_same_where_some_are_left_out(masked, capability, dtype, monkeypatch):
    """`statistics` and `gradient` may differ in anything but rows and columns."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    target = launch.Target("cuda" if capability else "hip", capability, 132)
    monkeypatch.setattr(launch, "target_of", lambda device: target)
    side, state = make_side(4, 64, 32, dtype), RowState.fresh(torch.ones(4))
    for inv_tau, softcap in ((1.0, None), (0.5, None), (1.0, 30.0), (0.5, 30.0)):
        head = LMHead(side.head.weight.detach(), softcap=softcap)
        source = Source.of(SweepSide(side.hidden, head, None))
        setting = Setting(64, None, inv_tau, 1.0, softcap, 1.0, masked, 1)
        own = Launcher(setting, state, Sides(source, source), 4, 64)
        for divergence in DIVERGENCES.values():
            blocks = own._blocks(kernels.gradient, divergence.measure(0.5, 0.5), skipping=True)
            assert blocks[:2] == own.tile()


@pytest.mark.parametrize(
    ("of", "aligned"),
    [
        (lambda wide: wide[:-1].view(64, 48), True),
        (lambda wide: wide[1:].view(64, 48), False),  # an address in a flat buffer
        (lambda wide: wide[: 64 * 47].view(64, 47)[:, :32], False),
        (lambda wide: wide[:-1].view(48, 64).t(), True),  # copied
    ],
    ids=["plain", "address", "stride", "transposed"],
)
def test_blocks_of_heads_that_are_not_aligned(of, aligned, monkeypatch):
    """Loaded element by element they take the blocks of odd widths; larger ones spill."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    target = launch.Target("cuda", 90, 132)
    monkeypatch.setattr(launch, "target_of", lambda device: target)
    weight = of(torch.randn(64 * 48 + 1, dtype=torch.bfloat16))
    hidden = torch.randn(4, weight.shape[1], dtype=torch.bfloat16)
    state, setting = RowState.fresh(torch.ones(4)), Setting(64, None, 1.0, 1.0, None, 1.0, False, 1)
    source = Source.of(SweepSide(hidden, LMHead(weight), None))
    own = Launcher(setting, state, Sides(source, source), 4, 64)
    blocks = own._blocks(kernels.statistics)
    wanted = launch.fused_blocks(target, torch.bfloat16, 0 if aligned else 4, aligned)
    assert blocks == wanted and own._common(True, blocks)["DESCRIPTORS"] is aligned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_descriptors_load_what_pointers_load(dtype, monkeypatch):
    plain, made = per_row(dtype, divergence="jsd"), []
    real = launch.TensorDescriptor.from_tensor

    def describe(tensor, shape):
        made.append(shape)
        return real(tensor, shape)

    monkeypatch.setattr(launch, "wants_descriptors", lambda target: True)
    monkeypatch.setattr(launch.TensorDescriptor, "from_tensor", describe)
    described = per_row(dtype, divergence="jsd")
    assert made and all(torch.equal(a, b) for a, b in zip(described, plain, strict=True))


def test_offsets_beyond_32_bits():
    """The third row of logits starts 2^31 elements after the first; nothing else is touched."""
    rows, vocab, stride = 3, 40, 2**30
    small = [torch.randn(rows, vocab) for _ in range(2)]
    wide = [torch.empty(2 * stride + vocab) for _ in range(2)]
    views = [w.as_strided((rows, vocab), (stride, 1)) for w in wide]
    for view, values in zip(views, small, strict=True):
        view.copy_(values)
    measure = DIVERGENCES["forward_kl"].measure(0.5, 0.5)
    results = []
    for student, teacher in (small, views):
        state = RowState.fresh(torch.ones(rows))
        setting = Setting(vocab, None, 1.0, 1.0, None, 1.0, False, 1)
        sides = Sides(Source(None, 1.0, logits=student), Source(None, 1.0, logits=teacher))
        own = Launcher(setting, state, sides, rows, vocab)
        own.statistics(True, True, measure, True)
        own.gradient(measure, student)
        results.append((state.divergence, student.clone()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_asking_for_triton_where_it_cannot_run():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = (
        "import torch, dudi_kernels as k\n"
        "h, w, y = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1])\n"
        "k.linear_cross_entropy(h, w, y)\n"
        "k.linear_cross_entropy(h, w, y, backend='triton')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    wanted = (
        "backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 before the first import)"
    )
    assert wanted in run.stderr and "got cpu" in run.stderr


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (launch.Target("cuda", 75, 40), "torch"),
        (launch.Target("cuda", 80, 108), "triton"),
        (launch.Target("hip", 0, 304), "triton"),
        (launch.Target("xpu", 0, 64), "triton"),
    ],
    ids=["turing", "ampere", "rocm", "xpu"],
)
def test_auto_is_triton_where_it_has_tensor_cores(target, wanted, monkeypatch):
    monkeypatch.setattr(triton_backend, "planned", lambda device: target)
    device = torch.device("xpu" if target.kind == "xpu" else "cuda", 0)
    assert prepare.pick_backend("auto", device).__name__ == f"dudi_kernels.backends.{wanted}"
    if wanted == "torch":
        with pytest.raises(ValueError, match=r"from compute capability 8\.0 on, got cuda:0"):
            prepare.pick_backend("triton", device)


def test_precision_follows_torch():
    cuda, hip = (launch.Target(kind, 0, 1) for kind in ("cuda", "hip"))
    assert launch.precision(cuda, torch.bfloat16) == "tf32x3"  # of a LoRA's low rank
    assert launch.precision(cuda, torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert launch.precision(cuda, torch.float32) == "tf32x3"
        assert launch.precision(hip, torch.float32) == "ieee"  # the only one that compiles
    finally:
        torch.set_float32_matmul_precision("highest")
