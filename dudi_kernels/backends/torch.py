"""The primitives in plain torch, on any device.

`project` makes fp32 logits of a block of rows in a given buffer, `log_sum_exp` and `row_terms` read
them in tiles of a few rows so that temporaries stay small, and `row_terms` leaves the gradient in
the logits' place. `accumulate` turns that into the gradients of hidden states, weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.divergences import Divergence
from dudi_kernels.head import LMHead

WEIGHT_BLOCK = 4096  # head rows upcast at a time where the device has no mixed-precision GEMM
FLOOR = -1e38  # stands for log 0, so that 0 * (lp - lq) is 0 and not NaN
TINY = 1e-38  # keeps 0 / 0 out of the mixtures
INFINITE = 1e10  # a row sum beyond this met the floor: the divergence is infinite


class RowTerms(NamedTuple):
    divergence: Tensor  # (R,)
    entropy: Tensor  # (R,)
    teacher_entropy: Tensor  # (R,)


def _blocks(size: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, size)) for i in range(0, size, step))


def _mixed(a: Tensor, b: Tensor) -> bool:
    """Whether a GEMM of these half-precision inputs can accumulate and return fp32 by itself."""
    return a.is_cuda and a.dtype == b.dtype and a.dtype != torch.float32


def project(
    hidden: Tensor,  # (R, D)
    head: LMHead,
    out: Tensor,  # (R, V) fp32
) -> Tensor:
    """softcap(hidden W^T + bias) * scale into `out`, in fp32 whatever the inputs are."""
    weight = head.weight.detach()
    if weight.dtype == hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    elif _mixed(hidden, weight):
        out.copy_(torch.mm(hidden, weight.t(), out_dtype=torch.float32))
    else:
        rows = hidden.float()
        for block in _blocks(len(weight), WEIGHT_BLOCK):
            torch.mm(rows, weight[block].float().t(), out=out[:, block])
    if head.bias is not None:
        out.add_(head.bias.detach())
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.scale != 1.0:
        out.mul_(head.scale)
    return out


def log_sum_exp(logits: Tensor, tile_rows: int, out: Tensor) -> Tensor:
    """(R,) log-sum-exp of each row, a few rows at a time."""
    for tile in _blocks(len(logits), tile_rows):
        torch.logsumexp(logits[tile], dim=1, out=out[tile])
    return out


def _floored(log_probs: Tensor, masked: bool) -> Tensor:
    return log_probs.clamp_(min=FLOOR) if masked else log_probs


def _log_softmax(logits: Tensor, inv_tau: float, masked: bool) -> Tensor:
    scaled = logits * inv_tau if inv_tau != 1.0 else logits
    return _floored(torch.log_softmax(scaled, dim=1), masked)


def _entropy(probs: Tensor, log_probs: Tensor) -> Tensor:
    return -torch.einsum("rv,rv->r", probs, log_probs)


def _divergence(
    divergence: Divergence, share: float | None, p: Tensor, lp: Tensor, q: Tensor, lq: Tensor
) -> tuple[Tensor, Tensor]:
    """(R,) divergence and (R, V) g."""
    m = lm = None
    if share is not None:
        m = torch.lerp(q, p, share).clamp_(min=TINY)
        lm = m.log()
    phi, g = divergence(p, lp, q, lq, m, lm, share)
    total = phi.sum(1)
    return torch.where(total > INFINITE, torch.inf, total), g


def row_terms(
    logits: Tensor,  # (R, V) the student's; replaced by the gradient where `head` is given
    log_sum: Tensor,  # (R,)
    teacher_logits: Tensor | None,  # (R, V)
    divergence: Divergence | None,
    share: float | None,
    inv_tau: float,
    weight: Tensor,  # (R,) of the divergence
    coefficient: Tensor | None,  # (R,) of the target's log-probability
    targets: Tensor | None,  # (R,)
    head: LMHead | None,
    masked: bool,
) -> RowTerms:
    """Divergence, entropies and (in place) the gradient of a tile of rows."""
    lq1 = _floored(logits - log_sum[:, None], masked)
    q1 = lq1.exp()
    entropy = _entropy(q1, lq1)
    total = teacher_entropy = torch.zeros_like(log_sum)
    grad = None
    if divergence is not None:
        assert teacher_logits is not None
        one = inv_tau == 1.0
        lq = lq1 if one else _log_softmax(logits, inv_tau, masked)
        q = q1 if one else lq.exp()
        lp = _log_softmax(teacher_logits, inv_tau, masked)
        p = lp.exp()
        lp1 = lp if one else _log_softmax(teacher_logits, 1.0, masked)
        teacher_entropy = _entropy(p if one else lp1.exp(), lp1)
        total, g = _divergence(divergence, share, p, lp, q, lq)
        if head is not None:
            grad = torch.addcmul(g, q, g.sum(1, keepdim=True), value=-1)
            grad.mul_((weight * inv_tau)[:, None])
    if head is None:
        return RowTerms(total, entropy, teacher_entropy)
    if coefficient is not None:
        assert targets is not None
        pull = q1.mul_(-coefficient[:, None])
        pull.scatter_add_(1, targets[:, None], coefficient[:, None])
        grad = pull if grad is None else grad.add_(pull)
    if grad is None:
        logits.zero_()
        return RowTerms(total, entropy, teacher_entropy)
    through_shape(grad, logits, head)
    logits.copy_(grad)
    return RowTerms(total, entropy, teacher_entropy)


def through_shape(grad: Tensor, logits: Tensor, head: LMHead) -> None:
    """Chain the gradient through softcap and scale, in place."""
    if head.softcap is not None:
        capped = logits / (head.softcap * head.scale)
        grad.mul_(1 - capped.square_())
    if head.scale != 1.0:
        grad.mul_(head.scale)


def accumulate(
    grad: Tensor,  # (R, V) gradient of the raw logits
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    grad_hidden: Tensor | None,  # (R, D) fp32, written
    grad_weight: Tensor | None,  # (V, D) fp32, added to
    grad_bias: Tensor | None,  # (V,) fp32, added to
) -> None:
    """The two GEMMs of the backward pass, and the bias."""
    weight = weight.detach()
    if grad_hidden is not None:
        if _mixed(hidden, weight):
            half = grad.to(weight.dtype)
            grad_hidden.copy_(torch.mm(half, weight, out_dtype=torch.float32))
        elif weight.dtype == torch.float32:
            torch.mm(grad, weight, out=grad_hidden)
        else:
            grad_hidden.zero_()
            for block in _blocks(len(weight), WEIGHT_BLOCK):
                grad_hidden.addmm_(grad[:, block], weight[block].float())
    if grad_weight is not None:
        if _mixed(hidden, weight):
            half = grad.to(hidden.dtype)
            grad_weight.add_(torch.mm(half.t(), hidden, out_dtype=torch.float32))
        else:
            grad_weight.addmm_(grad.t(), hidden.float())
    if grad_bias is not None:
        grad_bias.add_(grad.sum(0))


def write_block(
    grad: Tensor,  # (N, B) gradient of the raw logits of a vocabulary block
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (B, D)
    grad_hidden: Tensor | None,  # (N, D) fp32, added to
    grad_weight: Tensor | None,  # (B, D) in the head's dtype, written
    grad_bias: Tensor | None,  # (B,), written
) -> None:
    """The same two GEMMs for all rows and one block of the vocabulary."""
    if grad_hidden is not None:
        grad_hidden.addmm_(grad, weight.float())
    if grad_weight is not None:
        grad_weight.copy_(grad.t() @ hidden.float())
    if grad_bias is not None:
        grad_bias.copy_(grad.sum(0))
