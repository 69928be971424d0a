"""The primitives in plain torch, on any device.

`project` makes fp32 logits of a block of rows in a given buffer; `normalize` turns them into
log-probabilities and `row_terms` these into the gradient of the raw logits, both in place and in
tiles of a few rows, so that temporaries stay in cache; `accumulate` makes of that the gradients of
hidden states, weight and bias. `stream_block` and `block_gradient` do the same by vocabulary block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dudi_kernels.divergences import FLOOR, TINY, Measure
from dudi_kernels.head import LMHead
from dudi_kernels.plan import BLOCK

MM_RETURNS_FP32 = "dtype" in torch.ops.aten.mm.overloads()  # torch >= 2.8


class RowTerms(NamedTuple):
    divergence: Tensor  # (R,)
    entropy: Tensor  # (R,)
    teacher_entropy: Tensor  # (R,)


def _gemm_dtype(hidden: Tensor, backward: bool) -> torch.dtype:
    """Half precision only where a GEMM of it returns fp32; its gradients only in bf16."""
    native = hidden.is_cuda and torch.version.hip is None and MM_RETURNS_FP32
    half = torch.bfloat16 if backward else hidden.dtype  # fp16 gradients would underflow
    return hidden.dtype if native and hidden.dtype == half else torch.float32


def _blocks(size: int, whole: bool) -> Iterator[slice]:
    """The vocabulary, in blocks where each needs a converted copy."""
    step = size if whole else BLOCK
    return (slice(i, min(i + step, size)) for i in range(0, size, max(step, 1)))


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


def project(
    hidden: Tensor,  # (R, D)
    head: LMHead,
    out: Tensor,  # (R, V) fp32
) -> Tensor:
    """softcap(hidden W^T + bias) * scale into `out`, in fp32 whatever the inputs are."""
    dtype = _gemm_dtype(hidden, backward=False)
    rows = hidden.to(dtype)
    for block in _blocks(len(head.weight), dtype == head.weight.dtype == torch.float32):
        _mm(rows, head.weight[block].to(dtype).t(), out[:, block], add=False)
    if head.bias is not None:
        out.add_(head.bias)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.scale != 1.0:
        out.mul_(head.scale)
    return out


def accumulate(
    grad: Tensor,  # (R, V) fp32 gradient of the raw logits
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    grad_hidden: Tensor | None,  # (R, D) fp32, added to
    grad_weight: Tensor | None,  # (V, D) fp32, added to
    grad_bias: Tensor | None,  # (V,) fp32, added to
) -> None:
    """The two GEMMs of the backward pass, and the bias."""
    dtype = _gemm_dtype(hidden, backward=True)
    rows = hidden.to(dtype)
    for block in _blocks(len(weight), dtype == weight.dtype == torch.float32):
        part = grad[:, block].to(dtype)
        if grad_hidden is not None:
            _mm(part, weight[block].to(dtype), grad_hidden, add=True)
        if grad_weight is not None:
            _mm(part.t(), rows, grad_weight[block], add=True)
    if grad_bias is not None:
        grad_bias.add_(grad.sum(0))


def normalize(
    logits: Tensor,  # (R, V) becomes log-probabilities
    targets: Tensor | None,  # (R,)
    log_prob: Tensor,  # (R,) written where there are targets
    log_sum: Tensor | None,  # (R,) written; the logits must be finite
) -> None:
    """Log-softmax of a tile in place."""
    values = torch.log_softmax(logits, dim=1)
    if log_sum is not None:
        torch.sub(logits[:, 0], values[:, 0], out=log_sum)
    logits.copy_(values)
    if targets is not None:
        torch.gather(values, 1, targets[:, None], out=log_prob[:, None])


def _floored(log_probs: Tensor, masked: bool) -> Tensor:
    return log_probs.clamp_(min=FLOOR) if masked else log_probs


def _tempered(
    probs: Tensor, log_probs: Tensor, inv_tau: float, masked: bool
) -> tuple[Tensor, Tensor]:
    if inv_tau == 1.0:
        return probs, log_probs
    tempered = torch.log_softmax(log_probs * inv_tau, dim=1)
    if masked:
        tempered.masked_fill_(log_probs <= FLOOR, FLOOR)  # FLOOR / T would pass for a probability
    return tempered.exp(), tempered


def _entropy(probs: Tensor, log_probs: Tensor) -> Tensor:
    return (probs * log_probs).sum(1).neg_()


def _divergence(
    measure: Measure, p: Tensor, lp: Tensor, q: Tensor, lq: Tensor, masked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(R,) divergence, (R, V) g and where masked (R,) rows whose gradient exists."""
    m = lm = None
    if measure.share is not None:
        m = torch.lerp(q, p, measure.share).clamp_(min=TINY)
        lm = m.log()
    phi, g = measure.terms(p, lp, q, lq, m, lm, measure.share)
    total = phi.sum(1)
    if not masked:
        return total, g, None
    smooth = torch.ones_like(total, dtype=torch.bool)
    for pole, log_masked, mass in ((measure.student_masks, lq, p), (measure.teacher_masks, lp, q)):
        if pole.phi or pole.g:
            hit = ((log_masked <= FLOOR) & (mass > 0)).any(1)
            total = total.masked_fill(hit, torch.inf) if pole.phi else total
            smooth = smooth & ~hit if pole.g else smooth
    return total, g, smooth


def row_terms(
    log_q: Tensor,  # (R, V) the student's; replaced by the gradient where `head` is given
    log_p: Tensor | None,  # (R, V) the teacher's
    measure: Measure | None,
    inv_tau: float,
    weight: Tensor,  # (R,) of the divergence
    coefficient: Tensor | None,  # (R,) of the target's log-probability
    targets: Tensor | None,  # (R,)
    log_sum: Tensor | None,  # (R,) where the student's head has a softcap
    head: LMHead | None,  # the student's, where gradients are wanted
    masked: bool,  # whether a log-probability may be -inf
) -> RowTerms:
    """Divergence, entropies and (in place) the gradient of the raw logits of a tile of rows."""
    lq1 = _floored(log_q, masked)
    q1 = lq1.exp()
    entropy = _entropy(q1, lq1)
    divergence = teacher_entropy = torch.zeros_like(weight)
    q = g = None
    if measure is not None:
        assert log_p is not None
        lp1 = _floored(log_p, masked)
        p1 = lp1.exp()
        teacher_entropy = _entropy(p1, lp1)
        q, lq = _tempered(q1, lq1, inv_tau, masked)
        p, lp = _tempered(p1, lp1, inv_tau, masked)
        divergence, g, smooth = _divergence(measure, p, lp, q, lq, masked)
        weight = weight if smooth is None else weight * smooth
    terms = RowTerms(divergence, entropy, teacher_entropy)
    if head is None:
        return terms
    slope = _slope(lq1, log_sum, head)
    if q is None or g is None:
        log_q.zero_()
    else:
        torch.addcmul(g, q, g.sum(1, keepdim=True), value=-1, out=log_q)
        log_q.mul_((weight * inv_tau)[:, None])
    if coefficient is not None:
        assert targets is not None
        log_q.addcmul_(q1, coefficient[:, None], value=-1)
        log_q.scatter_add_(1, targets[:, None], coefficient[:, None])
    if slope is not None:
        log_q.mul_(slope)
    return terms


def _slope(logits: Tensor, log_sum: Tensor | None, head: LMHead) -> Tensor | float | None:
    """d logit / d raw logit through softcap and scale; `logits` may lack their log-sum-exp."""
    if head.softcap is None:
        return head.scale if head.scale != 1.0 else None
    raw = logits if log_sum is None else logits + log_sum[:, None]
    capped = raw / (head.softcap * head.scale)
    return capped.square_().neg_().add_(1).mul_(head.scale)


def stream_block(
    logits: Tensor,  # (N, B) of a vocabulary block; overwritten
    inv_tau: float,
    local: Tensor,  # (N,) target within the block, or outside of it
    log_sum: Tensor,  # (N,) running log-sum-exp, updated
    target: Tensor,  # (N,) scaled logit of the target, written by the block that has it
) -> None:
    """One block of an online log-sum-exp."""
    logits.mul_(inv_tau)
    torch.logaddexp(log_sum, torch.logsumexp(logits, 1), out=log_sum)
    inside, index = _inside(local, logits.shape[1])
    target.copy_(torch.where(inside, logits.gather(1, index)[:, 0], target))


def block_gradient(
    logits: Tensor,  # (N, B) replaced by the gradient of the raw logits
    inv_tau: float,
    local: Tensor,  # (N,)
    log_sum: Tensor,  # (N,)
    grad: Tensor,  # (N,) of the targets' log-probabilities
    head: LMHead,
) -> None:
    """grad * (onehot - q) / T of one block, through softcap and scale."""
    slope = _slope(logits, None, head)
    coefficient = (grad * inv_tau)[:, None]
    logits.mul_(inv_tau).sub_(log_sum[:, None]).exp_().mul_(-coefficient)
    inside, index = _inside(local, logits.shape[1])
    logits.scatter_add_(1, index, coefficient * inside[:, None])
    if slope is not None:
        logits.mul_(slope)


def _inside(local: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block of `width` columns, and (N, 1) safe indices."""
    return (local >= 0) & (local < width), local.clamp(0, width - 1)[:, None]
