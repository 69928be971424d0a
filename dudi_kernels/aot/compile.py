"""Compilation of what the launchers would launch, for a GPU that is not there.

Launchers run on meta tensors with a stand-in for Triton's driver, which names the target; each
launch becomes a `warmup`. So signatures, specialisations, grids and descriptors are the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from dudi_kernels.aot import machine_code
from dudi_kernels.aot.strides import narrow_strides
from dudi_kernels.aot.targets import GPUS, TENSOR_COLUMNS, Gpu, Shape
from dudi_kernels.backends.triton import launch
from dudi_kernels.backends.triton.elements import INTERPRETED
from dudi_kernels.backends.triton.kernels import MASS_FIELDS
from dudi_kernels.divergences import DIVERGENCES
from dudi_kernels.head import LMHead, LoRA
from dudi_kernels.plan import DEFAULT_BUDGET, plan_block
from dudi_kernels.sweep import Side
from dudi_kernels.tiles import RowState, Setting

MAX_GRID = (2**31 - 1, 65_535, 65_535)
MAX_BOX = 256  # elements along a side of a descriptor's block
LOGITS_ROWS = 256  # of a chunk whose logits are read
RANK = 16  # of a LoRA
PLANNED_ROWS = (4_096, 65_536)  # whose blocks of the gradient are compiled


class Variant(NamedTuple):
    """What a launch has beside the divergence."""

    bias: bool = False  # so tokens may be masked
    tempered: bool = False
    softcap: bool = False
    lora: bool = False
    teacher: bool = True  # without: cross-entropy and entropy alone
    targets: bool = True  # and the gradient of their log-probabilities
    entropy: bool = False  # its gradient
    aligned: bool = True  # without: an odd vocabulary, and odd widths
    offset: bool = False  # heads that begin anywhere in a buffer
    skipping: bool = False  # of tiles, where the kernels project
    wide_teacher: bool = False  # in fp32, beside a student in half precision
    wide_weights: bool = False  # in fp32, under autocast


MOST = Variant(bias=True, tempered=True, softcap=True, entropy=True)
VARIANTS = {
    "plain": Variant(),
    "masked": Variant(bias=True),
    "tempered": Variant(tempered=True),
    "softcap": Variant(softcap=True),
    "lora": Variant(lora=True),
    "student": Variant(teacher=False),
    "untargeted": Variant(targets=False),
    "entropy": Variant(entropy=True),
    "unaligned": Variant(aligned=False),
    "offset": Variant(offset=True),
    "skipping": Variant(skipping=True),
    "mixed": Variant(wide_teacher=True),
    "autocast": Variant(wide_weights=True),
    "most": MOST,
    "skipping-most": MOST._replace(skipping=True),
    "everything": MOST._replace(lora=True),
}


class Launch(NamedTuple):
    """A kernel as it would be launched."""

    kernel: str
    grid: tuple[int, ...]
    blocks: launch.Blocks
    arguments: dict[str, Any]
    compiled: Any


class _Driver:
    """Answers what the compiler and `warmup` ask a driver."""

    def __init__(self, gpu: Gpu, number: int):
        self.target, self.number = GPUTarget(gpu.kind, gpu.arch, gpu.warp), number

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number  # one a target: compiled kernels are kept by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def recorded(gpu: Gpu) -> Iterator[list[Launch]]:
    """Launches become compilations, as on that GPU."""
    if INTERPRETED:
        raise RuntimeError("ahead-of-time compilation needs TRITON_INTERPRET to be unset")
    number = [other.arch for other in GPUS.values()].index(gpu.arch)
    found: list[Launch] = []

    def record(device: torch.device, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        compiled = kernel.warmup(grid=grid, **arguments)
        blocks = launch.Blocks(
            *(arguments.get(name, 0) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D")),
            *(arguments.get(name, 0) for name in ("num_warps", "num_stages")),
        )
        found.append(Launch(kernel.__name__, grid, blocks, arguments, compiled))

    target = launch.Target(gpu.kind, gpu.arch if isinstance(gpu.arch, int) else 0, gpu.units)
    previous = triton.runtime.driver.active if torch.cuda.is_available() else None
    triton.runtime.driver.set_active(_Driver(gpu, number))
    try:
        with (
            mock.patch.object(launch, "run", record),
            mock.patch.object(launch, "target_of", lambda device: target),
        ):
            yield found
    finally:
        if previous is not None:
            triton.runtime.driver.set_active(previous)


def compile_all(
    gpu: Gpu,
    shape: Shape,
    rows: int,
    dtype: torch.dtype,
    divergence: str,
    *,
    fused: bool,
    variant: str = "plain",
) -> list[Launch]:
    """Every kernel of a divergence, in one of its variants."""
    extra = VARIANTS[variant]
    measure = DIVERGENCES[divergence].measure(0.5, 0.1) if extra.teacher else None
    rows = rows if fused else LOGITS_ROWS
    if not extra.aligned:
        shape = Shape(*(size + 1 for size in shape))
    softcap = 30.0 if extra.softcap else None

    def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def weight(columns: int, width: int, dtype: torch.dtype) -> Tensor:
        start = int(extra.offset)
        return meta(columns * width + start, dtype=dtype)[start:].view(columns, width)

    def source(width: int, columns: int, hidden: torch.dtype) -> launch.Source:
        if not fused:
            return launch.Source(softcap, 1.0, logits=meta(rows, columns))
        own = torch.float32 if extra.wide_weights else hidden
        bias = meta(columns, dtype=own) if extra.bias else None
        a, b = (meta(*size, dtype=own) for size in ((RANK, width), (columns, RANK)))
        lora = LoRA(a, b) if extra.lora else None
        head = LMHead(weight(columns, width, own), bias, softcap, lora=lora)
        low = meta(rows, RANK) if extra.lora else None
        return launch.Source.of(Side(meta(rows, width, dtype=hidden), head, low))

    state = RowState.fresh(meta(rows))
    state.coefficient = meta(rows) if extra.targets else None
    state.entropy_weight = meta(rows) if extra.entropy else None
    state.mixture = meta(rows) if measure is not None and measure.adaptive else None
    setting = Setting(
        vocabulary=shape.vocabulary,
        targets=meta(rows, dtype=torch.int64) if extra.targets else None,
        inv_tau=0.5 if extra.tempered else 1.0,
        teacher_inv_tau=0.5 if extra.tempered else 1.0,
        softcap=softcap,
        scale=1.0,
        masked=extra.bias,
        tile_rows=1,
    )

    def launcher(columns: int) -> launch.Launcher:
        student = source(shape.width, columns, dtype)
        wide = torch.float32 if extra.wide_teacher else dtype
        teacher = source(shape.teacher_width, columns, wide) if extra.teacher else None
        sides = launch.Sides(student, teacher)
        return launch.Launcher(setting, state, sides, rows, columns)

    chained = measure is None or measure.chain is not None
    with recorded(gpu) as found:
        whole = launcher(shape.vocabulary)
        masses = live = None
        if extra.skipping and fused:
            height, width = whole.tile()
            tiles = -(-shape.vocabulary // width)
            masses = meta(MASS_FIELDS, tiles, rows)
            live = meta(-(-rows // height), tiles, dtype=torch.bool)
        whole.statistics(True, extra.teacher, measure, chained, masses)
        if measure is None or not chained:
            whole.sums(measure)
        half = _gradient_dtype(gpu, dtype)
        for columns in sorted(_columns(gpu, shape, dtype, extra) if fused else {shape.vocabulary}):
            out = meta(rows, columns, dtype=half if fused else torch.float32)
            launcher(columns).gradient(measure, out, live)
    return found


def _gradient_dtype(gpu: Gpu, dtype: torch.dtype) -> torch.dtype:
    """As `accumulate` takes it there."""
    return torch.float32 if gpu.kind == "hip" or dtype == torch.float16 else dtype


def _columns(gpu: Gpu, shape: Shape, dtype: torch.dtype, extra: Variant) -> set[int]:
    """Of the gradient's blocks in the default budget, for few rows and for many; the last block
    of a vocabulary is short."""
    gradient = _gradient_dtype(gpu, dtype)
    convert = gradient != dtype or extra.wide_weights
    found = set()
    for rows in PLANNED_ROWS:
        block, _ = plan_block(
            rows,
            (shape.width,),
            convert,
            DEFAULT_BUDGET,
            cell=gradient.itemsize,
            cached=False,
            temporaries=False,
        )
        found |= {block, shape.vocabulary % block or block}
    return found


def limits(found: Launch, gpu: Gpu) -> list[str]:
    """What a launch would be refused for."""
    wrong = [
        f"grid axis {axis} is {size:,}, at most {most:,}"
        for axis, (size, most) in enumerate(zip(found.grid, MAX_GRID, strict=False))
        if size > most
    ]
    for name, value in found.arguments.items():
        if not hasattr(value, "block_shape"):
            continue
        if value.base.stride(0) * value.base.element_size() % 16:
            wrong.append(f"{name}: the stride of a descriptor must be a multiple of 16 bytes")
        if value.base.data_ptr() % 16:
            wrong.append(f"{name}: the address of a descriptor must be a multiple of 16")
        if max(value.block_shape) > MAX_BOX:
            wrong.append(f"{name}: a descriptor's block is at most {MAX_BOX} long")
    if (shared := found.compiled.metadata.shared) > gpu.shared:
        wrong.append(f"{shared:,} bytes of shared memory, at most {gpu.shared:,}")
    if (columns := machine_code.tensor_columns(found.compiled)) > TENSOR_COLUMNS:
        wrong.append(f"{columns} columns of tensor memory, at most {TENSOR_COLUMNS}")
    wrong += map("{} is multiplied in 32 bits".format, narrow_strides(found.compiled.asm["ttir"]))
    return wrong
