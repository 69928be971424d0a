"""The GPUs that are compiled for, and their published rates."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Rates are for each multiprocessor (compute unit) and clock."""

    name: str  # of a product with this architecture
    kind: str  # "cuda" or "hip"
    arch: int | str
    warp: int  # threads
    units: int  # multiprocessors
    clock: float  # GHz, boost
    registers: int  # 32-bit, of a multiprocessor
    threads: int  # resident at most
    shared: int  # bytes a program may have
    shared_total: int  # bytes of a multiprocessor
    half_macs: int  # tensor cores, bf16 and fp16, dense
    fp32_macs: int  # without tensor cores
    issue: int  # instructions of a warp
    specials: int  # exp2, log2, reciprocal
    shared_bytes: int
    memory: float  # TB/s
    mma: tuple[str, ...]  # how a tensor-core instruction begins


KB = 1024
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory, where it has one
GPUS = {
    "sm_80": Gpu(
        "A100", "cuda", 80, 32, 108, 1.41, 65536, 2048, 163 * KB, 164 * KB,
        1024, 64, 4, 16, 128, 2.04, ("HMMA",),
    ),
    "sm_90": Gpu(
        "H100", "cuda", 90, 32, 132, 1.83, 65536, 2048, 227 * KB, 228 * KB,
        2048, 128, 4, 16, 128, 3.35, ("HGMMA",),
    ),
    "sm_100": Gpu(
        "B200", "cuda", 100, 32, 148, 1.85, 65536, 2048, 227 * KB, 228 * KB,
        4096, 128, 4, 16, 128, 8.0, ("UTCHMMA",),
    ),
    "sm_120": Gpu(
        "RTX 5090", "cuda", 120, 32, 170, 2.41, 65536, 1536, 99 * KB, 100 * KB,
        256, 128, 4, 16, 128, 1.79, ("HMMA",),
    ),
    "gfx942": Gpu(
        "MI300X", "hip", "gfx942", 64, 304, 2.1, 131072, 2048, 64 * KB, 64 * KB,
        1024, 128, 1, 16, 128, 5.3, ("v_mfma",),
    ),
    "gfx950": Gpu(
        "MI355X", "hip", "gfx950", 64, 256, 2.4, 131072, 2048, 160 * KB, 160 * KB,
        2048, 128, 1, 16, 128, 8.0, ("v_mfma",),
    ),
}  # fmt: skip


class Shape(NamedTuple):
    """Published heads: vocabulary and widths of student and teacher."""

    vocabulary: int
    width: int
    teacher_width: int


SHAPES = {
    "SmolLM2 135M from itself": Shape(49_152, 576, 576),
    "Qwen2.5 0.5B from 3B": Shape(151_936, 896, 2_048),
    "Qwen2.5 1.5B from 7B": Shape(151_936, 1_536, 3_584),
    "Gemma 3 270M from 1B": Shape(262_144, 640, 1_152),
    "Gemma 3 1B from 4B": Shape(262_144, 1_152, 2_560),
    "Llama 3.2 1B from 3.1 8B": Shape(128_256, 2_048, 4_096),
}
ROWS = 4_096
