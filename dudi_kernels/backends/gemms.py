"""The GEMMs that backends share: fp32 logits from any dtype, and those of the backward pass.

`project` makes fp32 logits of a block of rows in a given buffer, `accumulate` the gradients of
hidden states, weight and bias from the gradient of the logits: by torch, or on a CPU with AMX by
native/gemm.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dudi_kernels.backends.native import gemm
from dudi_kernels.plan import BLOCK, Packing, copied_rows
from dudi_kernels.sweep import Gradients, Side


def _gemm_dtype(device: torch.device, dtype: torch.dtype, backward: bool) -> torch.dtype:
    """Half precision only where a GEMM of it returns fp32; its gradients only in bf16."""
    native_mm = device.type == "cuda" and torch.version.hip is None
    half = torch.bfloat16 if backward else dtype  # fp16 gradients would underflow
    return dtype if native_mm and dtype == half else torch.float32


def converts(device: torch.device, dtypes: set[torch.dtype]) -> bool:
    """Whether blocks of a head, or of the logits' gradient, are converted for their GEMM."""
    if len(dtypes) > 1:
        return True
    (dtype,) = dtypes
    return any(_gemm_dtype(device, dtype, backward) != dtype for backward in (False, True))


def gradient_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of the gradient of logits that goes into `accumulate`, for hidden states of a dtype."""
    return _gemm_dtype(device, dtype, backward=True)


def _blocks(size: int, whole: bool) -> Iterator[slice]:
    """The vocabulary, in blocks where each needs a converted copy."""
    step = size if whole else BLOCK
    return (slice(i, min(i + step, size)) for i in range(0, size, max(step, 1)))


def _pieces(hidden: Tensor, dtype: torch.dtype, columns: int) -> Iterator[slice]:
    """Rows, in pieces where each needs a converted copy; one piece if there are none."""
    rows = len(hidden)
    step = rows if hidden.dtype == dtype else copied_rows(rows, columns)
    return (slice(i, i + step) for i in range(0, max(rows, 1), max(step, 1)))


def _converted(hidden: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    """At once for all blocks of a head, where one piece is all."""
    return hidden.to(dtype) if copied_rows(len(hidden), columns) == len(hidden) else hidden


def _mm(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """a @ b into fp32 `out`, or added to it."""
    if a.dtype == torch.float32:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    product = torch.mm(a, b, out_dtype=torch.float32)
    if add:
        out.add_(product)
    else:
        out.copy_(product)


def packing(
    device: torch.device, widths: tuple[int, ...], dtypes: set[torch.dtype]
) -> Packing | None:
    """What GEMMs that need no converted copies hold; None: there are none."""
    if not gemm.serves(device, *dtypes):
        return None
    half = torch.float32 not in dtypes
    return lambda rows, columns: max(gemm.workspace(rows, k, columns, half) for k in widths)


def project(side: Side, out: Tensor) -> Tensor:  # (R, V) fp32
    """Logits of a side into `out`, in fp32 whatever the inputs are."""
    head = side.head
    split = gemm.takes(side.hidden, head.weight, out)
    if split:
        gemm.project(side.hidden, head.weight, out)
    dtype = _gemm_dtype(side.hidden.device, side.hidden.dtype, backward=False)
    columns = len(head.weight)
    rows = side.hidden if split else _converted(side.hidden, dtype, columns)
    for block in _blocks(columns, dtype == head.weight.dtype == torch.float32):
        if not split:
            weight = head.weight[block].to(dtype).t()
            for piece in _pieces(rows, dtype, columns):
                _mm(rows[piece].to(dtype), weight, out[piece, block], add=False)
            del weight  # before the next block's is made
        if head.lora is not None and side.low is not None:
            _mm(side.low, head.lora.b[block].float().t(), out[:, block], add=True)
    if head.bias is not None:
        out.add_(head.bias)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.bias is not None:
            out.masked_fill_(head.bias == -torch.inf, -torch.inf)
    if head.scale != 1.0:
        out.mul_(head.scale)
    return out


def accumulate(
    grad: Tensor,  # (R, V) fp32 gradient of the raw logits
    side: Side,
    sums: Gradients,  # added to, where they are wanted
    add_weight: bool,  # or write the weight's for the first time
) -> None:
    """The GEMMs of the backward pass, and the bias."""
    head = side.head
    dtype = _gemm_dtype(side.hidden.device, side.hidden.dtype, backward=True)
    whole = dtype == head.weight.dtype == torch.float32
    split = gemm.takes(grad, side.hidden, head.weight)
    split_hidden = split and (len(grad) >= gemm.FEW_ROWS or not whole)
    if split_hidden and sums.hidden is not None:
        gemm.hidden_gradient(grad, head.weight, sums.hidden)
    if split and sums.weight is not None:
        gemm.weight_gradient(grad, side.hidden, sums.weight, add_weight)
    columns = len(head.weight)
    rows = side.hidden if split else _converted(side.hidden, dtype, columns)
    for block in _blocks(columns, whole):
        part = grad[:, block]
        own = part if split else part.to(dtype)
        if sums.hidden is not None and not split_hidden:
            _mm(own, head.weight[block].to(dtype), sums.hidden, add=True)
        if sums.weight is not None and not split:
            for piece in _pieces(rows, dtype, columns):
                add = add_weight or piece.start > 0
                _mm(own[piece].t(), rows[piece].to(dtype), sums.weight[block], add=add)
        if sums.low is not None and head.lora is not None:
            _mm(part.float(), head.lora.b[block].float(), sums.low, add=True)
        if sums.lora_b is not None and side.low is not None:
            _mm(part.float().t(), side.low, sums.lora_b[block], add=True)
    if sums.bias is not None:
        sums.bias.add_(grad.sum(0, dtype=torch.float32))
