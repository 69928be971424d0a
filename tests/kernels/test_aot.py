"""The Triton kernels as GPUs would run them, compiled ahead of time: machine code and limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dudi_kernels.aot import bound, machine_code, roofline
from dudi_kernels.aot.targets import GPUS, ROWS, SHAPES
from dudi_kernels.backends.triton import launch
from dudi_kernels.backends.triton.launch import Blocks
from dudi_kernels.plan import DEFAULT_BUDGET, plan_retain, prefers_recompute

QWEN = "Qwen2.5 0.5B from 3B"
LEAST = {"sm_80": 0.60, "sm_90": 0.70}  # of the tensor cores' use by `statistics`, at the most


@pytest.fixture(autouse=True)
def _steps() -> None:
    """Neither the compiled steps nor the plain ones."""


def compiled(file, *options):
    """Reports of another process: here the kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dudi_kernels.aot", "--json", str(file), "--shape", QWEN]
    run = subprocess.run(
        [*command, "--dtype", "bf16", *options], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "aot.json"
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    return compiled(file, "--divergence", "forward_kl", "jsd", "--target", *targets)


def of(reports, **wanted):
    found = [r for r in reports if all(r[k] == v for k, v in wanted.items())]
    assert found
    return found


def test_nothing_spills_and_everything_fits(reports):
    for report in reports:
        assert report["spilled"] == 0 and report["wrong"] == []
        assert report["instructions"].get("local", 0) == 0
        assert report["shared"] <= GPUS[report["target"]].shared and report["programs"] >= 1


def test_nor_where_a_launch_has_everything(tmp_path):
    """Bias, temperatures, softcap, a LoRA, the entropy's gradient; odd widths; odd addresses; tiles
    left out; a teacher or weights in fp32."""
    variants = ("everything", "unaligned", "offset", "skipping", "mixed", "autocast")
    options = ("--divergence", "jsd", "--target", "sm_90", "sm_120", "--variant", *variants)
    found = compiled(tmp_path / "aot.json", *options)
    assert {report["variant"] for report in found} == set(variants)
    for report in of(found, variant="everything", kernel="sums", projects=True):
        assert len(report["loops"]) == 4  # a LoRA's too run on tensor cores


def test_nor_the_maps_of_a_verbalizer(tmp_path):
    found = compiled(tmp_path / "aot.json", "--target", "sm_90", "gfx942", "--variant", "classes")
    kernels = {report["kernel"] for report in found}
    assert kernels == {"make_class_logits", "make_shares", "pull_gradient"}
    assert not any(report["wrong"] or report["spilled"] for report in found)


def test_nor_do_sums_of_masked_tokens(tmp_path):
    """The most that a kernel holds: more than beside a LoRA, which takes the smallest blocks."""
    options = ("--target", "sm_90", "gfx942", "--variant", "most")
    found = compiled(tmp_path / "aot.json", "--divergence", "alpha_beta", *options)
    assert len(of(found, kernel="sums", projects=True, spilled=0)) == 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_projections_run_on_tensor_cores(reports, target):
    for kernel in ("statistics", "sums", "gradient"):
        for report in of(reports, target=target, kernel=kernel, projects=True):
            assert len(report["loops"]) == 2 and all(loop["mma"] for loop in report["loops"])
    for report in of(reports, target=target, kernel="gradient", projects=False):
        assert report["instructions"].get("mma", 0) == 0


@pytest.mark.parametrize("target", LEAST)
def test_the_bound_of_the_forward_kernel(reports, target):
    wanted = {"kernel": "statistics", "projects": True, "divergence": "forward_kl"}
    (report,) = of(reports, target=target, **wanted)
    assert LEAST[target] <= report["bounds"][QWEN]["use"] <= 1


def test_the_table_has_the_bound(reports):
    from dudi_kernels.aot import report

    (own,) = of(
        reports, target="sm_90", kernel="statistics", projects=True, divergence="forward_kl"
    )
    table = report.table(reports)
    assert f"| {QWEN} | " in table and f" {own['bounds'][QWEN]['use']:.0%} |" in table
    assert table.count("| bf16 |") == 4


def test_what_a_launch_would_be_refused_for():
    from dudi_kernels.aot import compile

    metadata = SimpleNamespace(shared=2**20, tmem_size=1024)
    blocks = Blocks(1, 1, 1, 1, 1)
    ttir = "tt.func @f(%x_stride: i32)\n%y = arith.muli %x_stride, %x_stride : i32"
    compiled = SimpleNamespace(metadata=metadata, asm={"ttir": ttir})
    own = compile.Launch("sums", (1, 2**16), blocks, {}, compiled)
    assert [reason.split(", at most")[0] for reason in compile.limits(own, GPUS["sm_90"])] == [
        "grid axis 1 is 65,536",
        "1,048,576 bytes of shared memory",
        "1024 columns of tensor memory",
        "x_stride is multiplied in 32 bits",
    ]


STRIDES = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dudi_kernels.aot.strides import narrow_strides

@triton.jit
def kernel(x, x_stride, y_stride, WAY: tl.constexpr):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    j = tl.arange(0, 16)[None, :]
    if WAY == 0:
        at = i.to(tl.int64)[:, None] * x_stride + y_stride + j
    elif WAY == 1:
        at = (i[:, None] * x_stride).to(tl.int64) + j
    elif WAY == 2:  # through a sum, a splat and a broadcast
        at = (i[:, None] + j) * (x_stride + 1) + i.to(tl.int64)[:, None] * y_stride
    else:
        step = y_stride
        at = i[:, None].to(tl.int64) * x_stride + j
        for _ in range(WAY):
            at += i[:, None] * step
            step += 16
    tl.store(x + at, 0.0)

for way in range(4):
    signature = {"x": "*fp32", "x_stride": "i32", "y_stride": "i32", "WAY": "constexpr"}
    source = ASTSource(kernel, signature, {"WAY": way})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(*narrow_strides(compiled.asm["ttir"]), sep=",")
"""


def test_a_row_times_a_stride_in_32_bits_is_found(tmp_path):
    """Kernels that are wrong in three ways; every kernel that is compiled is looked at so."""
    file = tmp_path / "strides.py"
    file.write_text(STRIDES)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["", "x_stride", "x_stride", "y_stride"]


def test_how_many_programs_a_multiprocessor_holds():
    gpu = GPUS["sm_100"]
    own = machine_code.Resources(97, 0, 30_000, 128, 256)
    assert bound.programs(own, gpu) == 2  # 104 registers are given
    assert bound.programs(own._replace(registers=32), gpu) == 4  # 512 columns of tensor memory
    assert bound.programs(own._replace(registers=32, tensor_columns=0), gpu) == 7  # 228 KB
    assert bound.programs(own._replace(registers=32, tensor_columns=0, shared=0), gpu) == 8


def test_the_kernels_load_by_descriptors_where_the_target_has_them(reports):
    for target, least in (("sm_90", True), ("sm_80", False)):
        (report,) = of(reports, target=target, kernel="statistics", projects=True, divergence="jsd")
        assert report["descriptors"] is least


def test_loops_are_found_by_backward_branches():
    text = """
        /*0000*/  MOV R1, R2 ;
        /*0010*/  HMMA.16816 R4, R5, R6, R4 ;
        /*0020*/  @P0 BRA 0x10 ;
        /*0030*/  MUFU.EX2 R1, R2 ;
        /*0040*/  @P1 BRA 0x0 ;
        /*0050*/  EXIT ;
        /*0060*/  BRA 0x20 ;
    """
    code = machine_code._nvidia(text)
    assert machine_code.loops(code) == [machine_code.Loop(0, 0x40), machine_code.Loop(0x10, 0x20)]
    counts = machine_code.by_class(code, GPUS["sm_80"])
    assert counts["mma"] == 1 and counts["special"] == 1 and counts["control"] == 4


def test_peaks_are_the_published_ones():
    published = {"sm_80": 312e12, "sm_90": 989e12, "sm_100": 2250e12, "gfx942": 1307e12}
    for target, peak in published.items():
        assert roofline.peak(GPUS[target]) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_costs_on_paper_are_consistent(target, shape):
    gpu, one = GPUS[target], 2.0 * ROWS * shape.vocabulary
    found = roofline.costs(gpu, shape, ROWS)
    for way in ("dense", "Liger 0.8.5", "retain"):
        assert found[way].flops == one * (3 * shape.width + shape.teacher_width)
    for way in ("TRL 1.16", "recompute"):
        assert found[way].flops == one * (4 * shape.width + 2 * shape.teacher_width)
    assert min(found, key=lambda way: found[way].gigabytes) == "recompute"
    alone = roofline.cross_entropy_costs(gpu, shape, ROWS)
    assert all(cost.flops == one * 4 * shape.width for cost in alone.values())
    for cost in (*found.values(), *alone.values()):
        assert cost.l2_gigabytes > cost.gigabytes
        least = max(cost.flops / roofline.peak(gpu), cost.gigabytes * 1e9 / (gpu.memory * 1e12))
        assert cost.milliseconds >= least * 1e3 * 0.999
    half = roofline.costs(gpu, shape, ROWS // 2)
    assert half["recompute"].flops == found["recompute"].flops / 2


@pytest.mark.parametrize("rows", [512, 4096, 16_384])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_plan_takes_what_is_cheaper_on_paper(target, shape, rows):
    gpu, (v, *widths) = GPUS[target], SHAPES[shape]
    found = roofline.costs(gpu, SHAPES[shape], rows)
    plan = plan_retain(v, tuple(widths), False, DEFAULT_BUDGET, cached=False, temporaries=False)
    assert isinstance(gpu.arch, int)
    balance = launch.flops_per_byte(launch.Target("cuda", gpu.arch, gpu.units), torch.bfloat16)
    chosen = prefers_recompute(rows, v, tuple(widths), 2, plan.chunk_rows, balance)
    assert chosen == (found["recompute"].milliseconds < found["retain"].milliseconds)


def test_costs_on_paper_by_hand():
    """One row of tiles of Liger's and TRL's: N = 1,024, V = 32,768, D = E = 64."""
    shape, n, v, d = type(SHAPES[QWEN])(32_768, 64, 64), 1024, 32_768, 64
    found = roofline.costs(GPUS["sm_90"], shape, n)
    liger = n * v * 22 + v * d * 2 * (2 + 1 + 4)
    assert found["Liger 0.8.5"].gigabytes * 1e9 == pytest.approx(liger)
    trl = n * v * 46 + v * d * (2 * 2 * 2 + 2 + 8 + 4 + 6) + n * d * 8
    assert found["TRL 1.16"].gigabytes * 1e9 == pytest.approx(trl)
    recompute = n * v * 6 + v * d * (2 * 2 * 2 + 2 + 4 + 6) + 8 * n * d * 8
    assert found["recompute"].gigabytes * 1e9 == pytest.approx(recompute)


def test_costs_on_paper_use_the_tiles_of_the_launcher(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for gpu in GPUS.values():
        if gpu.name in roofline.KERNEL_TILES:
            target = launch.Target(gpu.kind, int(gpu.arch), gpu.units)
            blocks = launch.fused_blocks(target, torch.bfloat16)
            assert blocks[:2] == roofline.KERNEL_TILES[gpu.name]


def test_the_table_of_versions_starts_where_the_requirement_does():
    root = Path(__file__).parents[2]
    table = (root / "docs/kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (3\.\d+) \| (2\.\d+) \|.*\| (\w+)[^|]*\|$", table, re.M)
    oldest = next((triton, torch) for triton, torch, compiles in rows if compiles == "yes")
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in zip(("triton", "torch"), oldest, strict=True):
        assert f'"{name}>={version}' in project
