"""The public functions: check inputs, pick a backend, describe the sweep, name what comes back.

Hidden states may have any leading shape (..., D); per-row results come back in that shape. Logits
are fp32 from the GEMM on, whatever the inputs' dtype, and (N, V) of them never exist. Divergences
and log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dudi_kernels import checks
from dudi_kernels.head import LMHead
from dudi_kernels.plan import DEFAULT_BUDGET, Plan, plan_block, plan_retain
from dudi_kernels.sweep import LogProb, Needs, Retain, RowValues, Side, Span, Task

BACKENDS = ("auto", "torch", "triton")
Head = LMHead | Tensor


class DistillLoss(NamedTuple):
    loss: Tensor  # () fp32, differentiable
    divergence: Tensor  # (N,) the rest is fp32 and detached
    log_prob: Tensor  # (N,) of the target at temperature 1; NaN where no targets were given
    entropy: Tensor  # (N,) of the student at temperature 1
    teacher_entropy: Tensor  # (N,) of the teacher at temperature 1


class DuDiLoss(NamedTuple):
    loss: Tensor  # () fp32, differentiable; all else is fp32 and detached
    off_policy_loss: Tensor  # () mean divergence over the rows of y+
    on_policy_loss: Tensor  # () mean divergence over the rows of y-
    preference_loss: Tensor  # () mean over pairs
    ce_loss: Tensor  # () mean over the rows of y+
    margins: Tensor  # (P,) r(y+) - r(y-), before preference_beta
    log_probs: Tensor  # (S,) of each sequence under the student
    reference_log_probs: Tensor  # (S,) zeros where there is no reference
    divergence: Tensor  # (N,)
    log_prob: Tensor  # (N,)
    entropy: Tensor  # (N,)
    teacher_entropy: Tensor  # (N,)


def _backend(name: str) -> ModuleType:
    checks.one_of("backend", name, BACKENDS)
    match name:
        case "triton":
            raise ValueError("backend='triton' is not available in this release; use 'torch'")
        case _:
            import dudi_kernels.backends.torch as backend

            return backend


def _tracked(*tensors: Tensor | None) -> Needs:
    """What autograd will ask for; `ctx.needs_input_grad` stays True under no_grad."""
    enabled = torch.is_grad_enabled()
    return Needs(*(enabled and t is not None and t.requires_grad for t in tensors))


def _common_dtype(rows: checks.Rows) -> checks.Rows:
    """Bring hidden states to the head's dtype, or under autocast both to its dtype."""
    hidden, head = rows.hidden, rows.head
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden = hidden.to(dtype)
        if kind != "cpu":  # where half-precision GEMMs pay
            head = LMHead(head.weight.to(dtype), head.bias, head.softcap, head.scale)
    elif hidden.dtype != head.weight.dtype:
        hidden = hidden.to(torch.promote_types(hidden.dtype, head.weight.dtype))
    return rows._replace(hidden=hidden, head=head)


def _side(who: str, hidden: Tensor, head: Head) -> checks.Rows:
    return _common_dtype(checks.side(who, hidden, head))


def _plan(student: checks.Rows, teacher: checks.Rows | None, memory_budget: int) -> Plan:
    sides = [student, *([teacher] if teacher else [])]
    upcast = any(s.head.weight.dtype != torch.float32 for s in sides)
    widths = tuple(s.head.width for s in sides)
    return plan_retain(student.head.vocab_size, widths, upcast, memory_budget)


def _chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


def _as_side(rows: checks.Rows) -> Side:
    return Side(rows.hidden.detach(), rows.head.detach())


def linear_distill_loss(
    student_hidden: Tensor,  # (N, D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (N, E)
    teacher_head: Head,  # (V, E)
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,  # (N,)
    targets: Tensor | None = None,  # (N,)
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> DistillLoss:
    """Weighted divergence of a student from a teacher, with cross-entropy beside it.

    Replaces::

        p = softmax(teacher_head(teacher_hidden).float() / temperature)
        q = softmax(student_head(student_hidden).float() / temperature)
        D = divergence(p, q).sum(-1)                       # forward_kl: (p * (p / q).log()).sum(-1)
        CE = cross_entropy(student_head(student_hidden).float(), targets, reduction="none")
        loss = (token_weight * (D + ce_weight * CE)).sum()

    Args:
        divergence: a name in `DIVERGENCES`; `beta` in (0, 1) belongs to jsd (the teacher's share),
            `alpha` in (0, 1) to the skew divergences. No factor of temperature squared.
        temperature: of both distributions in the divergence; log-probabilities, entropies and
            cross-entropy are at 1.
        token_weight: None means 1 / (number of rows that count) for each row.
        targets: needed for `ce_weight` and `log_prob`; a row whose target is `ignore_index` counts
            for nothing and reads 0 in every result.
        memory_budget: bytes of workspace beyond the gradients.

    Returns:
        `DistillLoss`; per-row results in the leading shape of `student_hidden`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that don't fit.

    Sources: GKD, arXiv 2306.13649 (jsd); MiniLLM, 2306.08543 (reverse KL); DistiLLM, 2402.03898
    (skew); f-distill, 2307.15190 (total variation).
    """
    student = _side("student", student_hidden, student_head)
    teacher = _side("teacher", teacher_hidden, teacher_head)
    checks.same_rows(student, teacher)
    chosen, share = checks.divergence("divergence", divergence, beta, alpha)
    checks.temperature("temperature", temperature)
    checks.number("ce_weight", ce_weight, 0, float("inf"))
    if ce_weight > 0 and targets is None:
        raise ValueError("targets must be given with ce_weight > 0")
    flat = None if targets is None else checks.targets(targets, student, ignore_index)
    weight = None if token_weight is None else checks.token_weight(token_weight, student)
    kept = None if flat is None else _kept(flat, ignore_index)
    pick = _pick(kept)
    values, loss = _weighted_sweep(
        student._replace(hidden=pick(student.hidden)),
        teacher._replace(hidden=pick(teacher.hidden)),
        None if flat is None else pick(flat),
        None if weight is None else pick(weight),
        Span(0, len(student.hidden) if kept is None else len(kept), chosen, share),
        ce_weight,
        1 / temperature,
        _backend(backend),
        memory_budget,
    )
    log_prob = values.log_prob if targets is not None else torch.full_like(values.log_prob, torch.nan)
    values = values._replace(log_prob=log_prob)
    return DistillLoss(
        loss,
        *(
            _put_back(v, kept, student)
            for v in (values.divergence, values.log_prob, values.entropy, values.teacher_entropy)
        ),
    )


def _kept(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that count, or None where all do."""
    ignored = targets == ignore_index
    return (~ignored).nonzero()[:, 0] if ignored.any() else None


def _pick(kept: Tensor | None):
    return (lambda t: t) if kept is None else (lambda t: t.index_select(0, kept))


def _put_back(values: Tensor, kept: Tensor | None, rows: checks.Rows) -> Tensor:
    if kept is not None:
        whole = values.new_zeros(len(rows.hidden))
        values = whole.index_copy(0, kept, values)
    return values.view(rows.shape)


def _weighted_sweep(
    student: checks.Rows,
    teacher: checks.Rows | None,
    targets: Tensor | None,
    weight: Tensor | None,
    span: Span | None,
    ce_weight: float,
    inv_tau: float,
    backend: ModuleType,
    memory_budget: int,
) -> tuple[RowValues, Tensor]:
    """sum_n weight_n (D_n + ce_weight CE_n) by one *retain* sweep."""
    rows = len(student.hidden)
    plan = _plan(student, teacher, memory_budget)
    if weight is None:
        weight = torch.full((rows,), 1 / max(rows, 1), device=student.hidden.device)
    pull = weight * -ce_weight  # d loss / d log q[target]

    def combine(values: RowValues) -> Tensor:
        own = values.divergence
        if ce_weight:
            own = own - ce_weight * values.log_prob
        return torch.where(weight == 0, 0, weight * own).sum()  # no 0 * inf

    task = Task(
        student=_as_side(student),
        teacher=None if teacher is None else _as_side(teacher),
        targets=targets,
        weight=weight,
        spans=[span] if span is not None and rows else [],
        groups=[[chunk] for chunk in _chunks(0, rows, plan.chunk_rows)],
        coefficients=(lambda a, b, *_: pull[a:b]) if ce_weight else None,
        teacher_log_prob=False,
        inv_tau=inv_tau,
        plan=plan,
        needs=_tracked(student.hidden, student.head.weight, student.head.bias),
    )
    head = student.head
    loss, *values = Retain.apply(student.hidden, head.weight, head.bias, task, backend, combine)
    return RowValues(*values), loss


def linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    head: Head,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    token_weight: Tensor | None = None,  # (N,)
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Cross-entropy of a head's predictions, in nats.

    Replaces::

        F.cross_entropy(head(hidden).float(), targets, reduction=reduction)

    Args:
        reduction: "mean" over the rows that count (0 where none does, unlike torch's NaN), "sum", or
            "none" for a differentiable value per row, in the leading shape of `hidden`.
        token_weight: with "sum" and "none" a factor per row; not with "mean".
        targets: rows with `ignore_index` count for nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that don't fit.
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    if token_weight is not None and reduction == "mean":
        raise ValueError("token_weight goes with reduction='sum' or 'none', got 'mean'")
    rows = _side("", hidden, head)
    flat = checks.targets(targets, rows, ignore_index)
    weight = None if token_weight is None else checks.token_weight(token_weight, rows)
    kept = _kept(flat, ignore_index)
    pick = _pick(kept)
    own = rows._replace(hidden=pick(rows.hidden))
    if weight is not None:
        weight = pick(weight)
    if reduction == "none":
        values = -_log_prob(own, pick(flat), 1.0, _backend(backend), memory_budget)
        return _put_back(values if weight is None else values * weight, kept, rows)
    if reduction == "sum" and weight is None:
        weight = torch.ones(len(own.hidden), device=own.hidden.device)
    _, loss = _weighted_sweep(
        own, None, pick(flat), weight, None, 1.0, 1.0, _backend(backend), memory_budget
    )
    return loss


def linear_log_prob(
    hidden: Tensor,  # (N, D)
    head: Head,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Log-probability of each target, differentiable by row.

    Replaces::

        log_softmax(head(hidden).float() / temperature, -1).gather(-1, targets[..., None])[..., 0]

    Returns:
        (N,) fp32 nats, in the leading shape of `hidden`; 0 where the target is `ignore_index`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ranges that don't fit.
    """
    rows = _side("", hidden, head)
    checks.temperature("temperature", temperature)
    flat = checks.targets(targets, rows, ignore_index)
    kept = _kept(flat, ignore_index)
    pick = _pick(kept)
    own = rows._replace(hidden=pick(rows.hidden))
    values = _log_prob(own, pick(flat), 1 / temperature, _backend(backend), memory_budget)
    return _put_back(values, kept, rows)


def _log_prob(
    rows: checks.Rows, targets: Tensor, inv_tau: float, backend: ModuleType, memory_budget: int
) -> Tensor:
    head = rows.head
    upcast = head.weight.dtype != torch.float32
    block = plan_block(len(rows.hidden), head.width, upcast, memory_budget)
    return LogProb.apply(
        rows.hidden, head.weight, head.bias, head.detach(), targets, inv_tau, block, backend
    )


def sequence_log_prob(
    hidden: Tensor,  # (N, D)
    head: Head,  # (V, D)
    targets: Tensor,  # (N,)
    segment_ids: Tensor,  # (N,) non-decreasing
    *,
    num_segments: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Log-probability of each sequence of packed rows, differentiable.

    Replaces::

        torch.stack([linear_log_prob(...)[segment_ids == s].sum() for s in range(S)])

    Returns:
        (S,) fp32 nats, S = `num_segments` or the largest segment id + 1; 0 for one without rows.

    Raises:
        ValueError, TypeError: as `linear_log_prob`; segment ids that decrease or are negative.
    """
    rows = checks.side("", hidden, head)
    segments = checks.segment_ids(segment_ids, rows)
    size = int(segments[-1]) + 1 if len(segments) else 0
    if num_segments is not None:
        if num_segments < size:
            raise ValueError(f"num_segments must be at least {size}, got {num_segments}")
        size = num_segments
    values = linear_log_prob(
        hidden,
        head,
        targets,
        temperature=temperature,
        ignore_index=ignore_index,
        backend=backend,
        memory_budget=memory_budget,
    )
    return values.new_zeros(size).index_add(0, segments, values.reshape(-1))
