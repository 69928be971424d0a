"""The GEMMs of an LM head by bf16 products on a CPU with AMX (gemm.cpp); called through ctypes.

fp32 operands are split into three bf16 terms, as accurate as fp32 GEMMs, or into two where
`torch.set_float32_matmul_precision` allows it. Without the instructions, or for other dtypes,
`takes` says no and torch does the same work. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform

import torch
from torch import Tensor

from dudi_kernels.backends import native
from dudi_kernels.backends.native.generate import fingerprint
from dudi_kernels.plan import MAX_CHUNK

PROJECT, HIDDEN_GRADIENT, WEIGHT_GRADIENT = range(3)
FEW_ROWS = 96  # fewer than these, and an fp32 GEMM makes the gradient of hidden states sooner
LEAST = 4_000_000  # multiplications that are worth a thread


class _Gemm(ctypes.Structure):
    """`struct Gemm` of gemm.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("left", "right", "out", "shared", "own")),
        *((name, ctypes.c_int64) for name in ("left_stride", "right_stride", "out_stride")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "columns", "next")),
        *((name, ctypes.c_int32) for name in ("role", "left_half", "right_half", "terms", "add")),
    ]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, where the machine has the instructions and it fits these sources."""
    if os.environ.get("DUDI_NATIVE") == "0" or platform.system() != "Linux":
        return None
    spec = importlib.util.find_spec(f"{native.__name__}._gemm_amx")
    if spec is None or spec.origin is None:
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    loaded = ctypes.CDLL(spec.origin)
    loaded.dudi_fingerprint.restype = ctypes.c_char_p
    if loaded.dudi_fingerprint().decode() != fingerprint() or not loaded.dudi_gemm_ready():
        return None
    job, size = ctypes.POINTER(_Gemm), ctypes.POINTER(ctypes.c_int64)
    loaded.dudi_gemm.argtypes = [job, ctypes.c_int64, ctypes.c_int64]
    loaded.dudi_gemm_pack.argtypes = loaded.dudi_gemm.argtypes
    loaded.dudi_gemm_bytes.argtypes = [job, size, size]
    loaded.dudi_gemm.restype = loaded.dudi_gemm_pack.restype = loaded.dudi_gemm_bytes.restype = None
    return loaded


def serves(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether there are such GEMMs, which need no converted copies."""
    known = all(dtype in (torch.float32, torch.bfloat16) for dtype in dtypes)
    return device.type == "cpu" and known and library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether GEMMs of these matrices can be served."""
    return serves(tensors[0].device, *(t.dtype for t in tensors)) and all(
        t.stride(1) == 1 or t.shape[1] <= 1 for t in tensors
    )


def workspace(rows: int, width: int, columns: int, half: bool) -> int:
    """Bytes of packed operands, at the most, of a head's three GEMMs."""
    rows = max((block.stop - block.start for block in _row_blocks(rows)), default=0)
    job = _Gemm(rows=rows, width=width, columns=columns, terms=_terms())
    found = []
    for role in (PROJECT, HIDDEN_GRADIENT, WEIGHT_GRADIENT):
        job.role, job.left_half, job.right_half = role, half and role == PROJECT, half
        found.append(_packed(job)[2])
    return max(found)


def _terms() -> int:
    """In how many an fp32 number is split."""
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


def _packed(job: _Gemm) -> tuple[int, int, int]:
    """Threads, bytes of the shared buffer, bytes of all buffers."""
    loaded = library()
    assert loaded is not None
    threads = max(1, min(torch.get_num_threads(), job.rows * job.width * job.columns // LEAST))
    shared, own = ctypes.c_int64(), ctypes.c_int64()
    loaded.dudi_gemm_bytes(job, shared, own)
    return threads, shared.value, shared.value + threads * own.value


def project(
    hidden: Tensor,  # (R, K)
    weight: Tensor,  # (V, K)
    out: Tensor,  # (R, V) fp32: hidden @ weight.T
) -> None:
    for rows in _row_blocks(len(hidden)):
        _run(PROJECT, hidden[rows], weight, out[rows], False)


def hidden_gradient(
    grad: Tensor,  # (R, V)
    weight: Tensor,  # (V, K)
    out: Tensor,  # (R, K) fp32: grad @ weight is added
) -> None:
    for rows in _row_blocks(len(grad)):
        _run(HIDDEN_GRADIENT, grad[rows], weight, out[rows], True)


def weight_gradient(
    grad: Tensor,  # (R, V)
    hidden: Tensor,  # (R, K)
    out: Tensor,  # (V, K) fp32: grad.T @ hidden is written or added
    add: bool,
) -> None:
    if len(grad) == 0 and not add:
        out.zero_()
    for rows in _row_blocks(len(grad)):
        _run(WEIGHT_GRADIENT, grad[rows], hidden[rows], out, add or rows.start > 0)


def _row_blocks(rows: int) -> list[slice]:
    """At most so many that their tiles fit a cache."""
    parts = -(-rows // MAX_CHUNK)
    return [slice(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


def _run(role: int, left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    loaded = library()
    assert loaded is not None and out.dtype == torch.float32
    width = left.shape[1] if role == PROJECT else right.shape[1]
    columns = out.shape[1] if role == PROJECT else left.shape[1]
    if 0 in out.shape:
        return
    job = _Gemm(
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
        left_stride=left.stride(0),
        right_stride=right.stride(0),
        out_stride=out.stride(0),
        rows=len(left),
        width=width,
        columns=columns,
        next=0,
        role=role,
        left_half=left.dtype == torch.bfloat16,
        right_half=right.dtype == torch.bfloat16,
        terms=_terms(),
        add=add,
    )
    threads, shared, size = _packed(job)
    memory = torch.empty(size, dtype=torch.uint8)
    job.shared = memory.data_ptr()
    job.own = memory.data_ptr() + shared
    for step in (loaded.dudi_gemm_pack, loaded.dudi_gemm):
        native.spread(step, [(job, i, threads) for i in range(threads)])
