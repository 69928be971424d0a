"""The public functions: check inputs, pick a backend, describe the sweep, name what comes back.

Hidden states may have any leading shape (..., D); per-row results come back in that shape. Logits
are fp32 from the GEMM on, whatever the inputs' dtype, and (N, V) of them never exist; autocast
rounds the hidden states, as it would for a linear layer, and no logits. Divergences, entropies and
log-probabilities are in nats. `three_signals.py` has `linear_dudi_loss`.

Hidden states and weights are not searched for NaN and inf, which would cost a pass over memory: a
row (of the head: any) that has one has NaN results, and so has the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dudi_kernels import checks, devices
from dudi_kernels.checks import Head, Rows
from dudi_kernels.classes import Classes
from dudi_kernels.compiled import traceable
from dudi_kernels.divergences import Measure
from dudi_kernels.plan import DEFAULT_BUDGET
from dudi_kernels.prepare import (
    Counted,
    as_side,
    log_prob,
    make_plan,
    on_device,
    pick_backend,
    row_wise,
    scalar,
    wanted_gradients,
)
from dudi_kernels.skipping import Skipped
from dudi_kernels.sweep import RowValues, Span, Task, chunks, even
from dudi_kernels.topk import Top, TopKTeacher
from dudi_kernels.verbalizer import Verbalizer


class DistillLoss(NamedTuple):
    loss: Tensor  # () fp32, differentiable
    divergence: Tensor  # (N,) the rest is fp32 and detached
    log_prob: Tensor  # (N,) of the target at temperature 1; NaN where no targets were given
    entropy: Tensor  # (N,) of the student at temperature 1
    teacher_entropy: Tensor  # (N,) of the teacher at temperature 1
    skipped: Tensor  # () share of the logits whose gradient was left out
    dropped: Tensor  # () bound on what was left out, at most gradient_tolerance


@traceable("student_hidden", "student_head", result=DistillLoss)
def linear_distill_loss(
    student_hidden: Tensor,  # (N, D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor | TopKTeacher,  # (N, E)
    teacher_head: Head | None = None,  # (V, E)
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    token_weight: Tensor | None = None,  # (N,)
    targets: Tensor | None = None,  # (N,)
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    gradient_tolerance: float = 0.0,
    teacher_top_p: float = 1.0,
    verbalizer: Verbalizer | None = None,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> DistillLoss:
    """Weighted divergence of a student from a teacher, with cross-entropy beside it.

    Replaces::

        p = softmax(teacher_head(teacher_hidden).float() / teacher_temperature)
        q = softmax(student_head(student_hidden).float() / temperature)
        D = divergence(p, q).sum(-1)                       # forward_kl: (p * (p / q).log()).sum(-1)
        CE = cross_entropy(student_head(student_hidden).float(), targets, reduction="none")
        loss = (token_weight * (D + ce_weight * CE)).sum()

    Gradients reach the student's hidden states and head, and only what requires them is allocated;
    the teacher gets none. They are made in the forward call, so `backward` works once.

    Args:
        teacher_hidden: or a `TopKTeacher`, with no `teacher_head`: the divergence is then over its
            tokens and one bucket with the rest of the vocabulary, at temperature 1; rows that it
            says nothing of have none.
        divergence: a name in `DIVERGENCES`; `beta` in (0, 1) belongs to jsd (the teacher's share)
            and jeffreys (the weight of forward KL), `alpha` in (0, 1) to the skew divergences, both
            (positive) to alpha_beta. adaptive_kl is jeffreys with each row's own weight of forward
            KL: the share of sum |p - q| that lies in the teacher's head, its likeliest tokens up to
            half of its mass; it has no gradient. No factor of temperature squared.
        temperature: of both distributions in the divergence, or of the student's where
            `teacher_temperature` is given; log-probabilities, entropies and cross-entropy are at 1.
        token_weight: None means 1 / (number of rows that count) for each row. A weight of 0 keeps
            a row out of the loss, but its hidden states must be finite.
        targets: needed for `ce_weight` and `log_prob`; a row whose target is `ignore_index` counts
            for nothing and reads 0 in every result.
        gradient_tolerance: 0 is exact. Otherwise the backward pass leaves out tiles of the logits
            (blocks of rows by blocks of the vocabulary) with next to no probability, so that the
            L1 norm of the logits' gradient that is lost stays under this share of the rows' weights
            (`token_weight / temperature`, and `ce_weight` of it); targets of the cross-entropy are
            kept. `skipped` and `dropped` tell what was. Values stay exact. Not while a CUDA graph
            is captured: the host asks which tiles are left.
        teacher_top_p: below 1, the teacher is restricted to its likeliest tokens of this mass (at
            its temperature; those that tie with the last one stay) and renormalised, in the sweep;
            `teacher_entropy` is that of the rest. Divergences that are infinite where the teacher
            gives a token no mass (reverse_kl, jeffreys) are refused. Not while a CUDA graph is
            captured.
        verbalizer: compare classes of tokens, of which both vocabularies have some: for a teacher
            with another tokenizer, a padded head, a lexicon (see `Verbalizer`). The divergence is
            over P = p M and Q_k, the sum of q over the tokens of class k; the rest stays the
            tokens' own. `token_weight`, or the rows given, must leave out the positions that the
            two tokenizations don't share (`align_responses`).
        memory_budget: bytes of workspace beyond the gradients.

    Returns:
        `DistillLoss`; per-row results in the leading shape of `student_hidden`. A divergence that
        is infinite (a bias of -inf masks a token that the other side gives mass) reads inf, and
        gradients stay finite. The value of a KL is exact to about 1e-7 nats: less than that between
        close models may read as below 0. Gradients have no such bound.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that don't fit.

    Sources: GKD, arXiv 2306.13649 (jsd); MiniLLM, 2306.08543 (reverse KL); DistiLLM, 2402.03898
    (skew); f-distill, 2307.15190 (total variation); ABKD, 2505.04560 (alpha-beta); AKL, 2404.02657
    (adaptive KL).
    """
    student = checks.side("student", student_hidden, student_head)
    measure = checks.divergence("divergence", divergence, beta, alpha)
    temperatures = checks.temperatures(temperature, teacher_temperature)
    ce_weight = checks.number("ce_weight", ce_weight, 0, math.inf)
    if ce_weight > 0 and targets is None:
        raise ValueError("targets must be given with ce_weight > 0, got None")
    ignored = checks.integer("ignore_index", ignore_index)
    flat = None if targets is None else checks.targets(targets, student, ignored)
    weight = token_weight
    if weight is not None:
        weight = checks.row_weight("token_weight", weight, student)
    checks.gradient_tolerance(gradient_tolerance, student)
    top_p = checks.top_p(teacher_top_p, student)

    counted = Counted(student, flat, ignored)
    settings: dict[str, Any] = {
        "measure": measure,
        "targets": None if flat is None else counted.pick(flat),
        "weight": counted.weight(weight),
        "ce_weight": ce_weight,
        "backend": pick_backend(backend, student.hidden.device),
        "memory_budget": memory_budget,
    }
    if isinstance(teacher_hidden, TopKTeacher):
        top = checks.top_k(
            teacher_hidden,
            teacher_head,
            student,
            temperatures,
            gradient_tolerance,
            top_p,
            verbalizer,
        )
        top = Top(*map(counted.pick, top))
        loss, values, skipped = _weighted_sweep(counted.rows(student), None, top=top, **settings)
    else:
        teacher = checks.side("teacher", teacher_hidden, teacher_head)
        teacher, classes = checks.pair_of_sides(student, teacher, verbalizer)
        checks.exact(gradient_tolerance, classes)
        checks.finite_measure("divergence", measure, classes, top_p)
        loss, values, skipped = _weighted_sweep(
            counted.rows(student),
            counted.rows(teacher),
            temperatures=temperatures,
            tolerance=gradient_tolerance,
            classes=classes,
            top_p=top_p,
            **settings,
        )
    own = values.log_prob if targets is not None else torch.full_like(values.log_prob, torch.nan)
    per_row = (values.divergence, own, values.entropy, values.teacher_entropy)
    return DistillLoss(loss, *map(counted.put_back, per_row), **skipped._asdict())


class DistillRows(NamedTuple):
    divergence: Tensor  # (N,) fp32, differentiable, as the next two are
    log_prob: Tensor  # (N,) of the target at temperature 1; NaN where no targets were given
    entropy: Tensor  # (N,) of the student at temperature 1
    teacher_entropy: Tensor  # (N,) of the teacher at temperature 1, detached


@traceable("student_hidden", "student_head", result=DistillRows, per_row=True)
def linear_distill(
    student_hidden: Tensor,  # (N, D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (N, E)
    teacher_head: Head,  # (V, E)
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    targets: Tensor | None = None,  # (N,)
    ignore_index: int = -100,
    verbalizer: Verbalizer | None = None,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> DistillRows:
    """Divergence, log-probability and entropy of each row, all differentiable together.

    Replaces::

        s, t = student_head(student_hidden).float(), teacher_head(teacher_hidden).float()
        p, q = softmax(t / teacher_temperature), softmax(s / temperature)
        D = divergence(p, q).sum(-1)
        logp = log_softmax(s, -1).gather(-1, targets[..., None])[..., 0]
        H = -(softmax(s) * log_softmax(s)).sum(-1)

    For losses whose row weights are not known before the values are; where they are,
    `linear_distill_loss` costs less (3 GEMMs of the student's and 1 of the teacher's, not 4 and 2).
    The vocabulary is streamed in blocks, twice forward for divergences other than the two KLs; the
    forward pass of adaptive_kl is over chunks of rows, so that the budget has to hold some.

    Args:
        divergence, beta, alpha, temperature, teacher_temperature, targets: as in
            `linear_distill_loss`; a row whose target is `ignore_index` reads 0 in every result.
        verbalizer: as in `linear_distill_loss`; both passes are then over chunks of rows.
        memory_budget: bytes of workspace beyond the gradients.

    Returns:
        `DistillRows`, in the leading shape of `student_hidden`; an infinite divergence reads inf
        and its gradient stays finite.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that don't fit.
    """
    student = checks.side("student", student_hidden, student_head)
    teacher = checks.side("teacher", teacher_hidden, teacher_head)
    teacher, classes = checks.pair_of_sides(student, teacher, verbalizer)
    measure = checks.divergence("divergence", divergence, beta, alpha)
    checks.finite_measure("divergence", measure, classes)
    temperatures = checks.temperatures(temperature, teacher_temperature)
    ignored = checks.integer("ignore_index", ignore_index)
    flat = None if targets is None else checks.targets(targets, student, ignored)
    counted = Counted(student, flat, ignored)
    divergences, own, entropy, teacher_entropy = row_wise(
        counted.rows(student),
        counted.rows(teacher),
        measure,
        None if flat is None else counted.pick(flat),
        temperatures,
        pick_backend(backend, student.hidden.device),
        memory_budget,
        entropy=True,
        classes=classes,
    )
    if targets is None:
        own = torch.full_like(own, torch.nan)
    return DistillRows(*map(counted.put_back, (divergences, own, entropy, teacher_entropy)))


def _weighted_sweep(
    student: Rows,
    teacher: Rows | None,
    measure: Measure | None,
    targets: Tensor | None,  # (N,)
    weight: Tensor,  # (N,)
    ce_weight: float,
    backend: ModuleType,
    memory_budget: int,
    temperatures: tuple[float, float] = (1.0, 1.0),
    tolerance: float = 0.0,
    classes: Classes | None = None,
    top_p: float = 1.0,
    top: Top | None = None,
) -> tuple[Tensor, RowValues, Skipped]:
    """sum_n weight_n (D_n + ce_weight CE_n) in one sweep."""
    rows = len(student.hidden)
    learner, guide = as_side(student), None if teacher is None else as_side(teacher)
    plan = make_plan(
        learner,
        guide,
        [measure],
        backend,
        memory_budget,
        skips=tolerance > 0,
        classes=classes,
        top_p=top_p,
        top=top,
    )
    task = Task(
        student=learner,
        teacher=guide,
        targets=targets,
        weight=weight,
        spans=[Span(0, rows, measure)] if measure is not None else [],
        groups=[[chunk] for chunk in chunks(0, rows, even(rows, plan.chunk_rows))],
        coefficient=weight * -ce_weight if ce_weight else None,
        coefficients=None,
        teacher_log_prob=False,
        inv_tau=1 / temperatures[0],
        teacher_inv_tau=1 / temperatures[1],
        plan=plan,
        needs=wanted_gradients(student),
        tolerance=tolerance,
        classes=classes,
        teacher_top_p=top_p,
        top=top,
    )
    return scalar(student, task, _combined(weight, ce_weight), backend, memory_budget)


def _combined(weight: Tensor, ce_weight: float) -> Callable[[RowValues], Tensor]:
    """The loss from per-row values."""

    def combine(values: RowValues) -> Tensor:
        own = values.divergence
        if ce_weight:
            own = own - ce_weight * values.log_prob
        return torch.where(weight == 0, 0, weight * own).sum()  # no 0 * inf

    return combine


@traceable("hidden", "head", per_row=lambda given: given.get("reduction") == "none")
def linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    head: Head,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Cross-entropy of a head's predictions, in nats.

    Replaces::

        F.cross_entropy(head(hidden).float(), targets, reduction=reduction)

    Args:
        reduction: "mean" over the rows that count (0 where none does, unlike torch's NaN), "sum",
            or "none" for a value per row, in the leading shape of `hidden`. All are
            differentiable; `backward` works once for the first two.
        targets: rows with `ignore_index` count for nothing.
        memory_budget: bytes of workspace beyond the gradients.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that don't fit.
    """
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    rows = checks.side("", hidden, head)
    ignored = checks.integer("ignore_index", ignore_index)
    flat = checks.targets(targets, rows, ignored)
    counted = Counted(rows, flat, ignored)
    own, flat = counted.rows(rows), counted.pick(flat)
    if reduction == "none":
        return counted.put_back(
            -log_prob(own, flat, 1.0, pick_backend(backend, rows.hidden.device), memory_budget)
        )
    ones = torch.ones(len(rows.hidden), device=flat.device)
    loss, _, _ = _weighted_sweep(
        own,
        None,
        None,
        flat,
        counted.weight(None if reduction == "mean" else ones),
        1.0,
        pick_backend(backend, rows.hidden.device),
        memory_budget,
    )
    return loss


@traceable("hidden", "head", per_row=True)
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

    The vocabulary is streamed in blocks, forward and again backward.

    Returns:
        (N,) fp32 nats, in the leading shape of `hidden`; 0 where the target is `ignore_index`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ranges that don't fit.
    """
    rows = checks.side("", hidden, head)
    temperature = checks.temperature(temperature)
    ignored = checks.integer("ignore_index", ignore_index)
    flat = checks.targets(targets, rows, ignored)
    counted = Counted(rows, flat, ignored)
    values = log_prob(
        counted.rows(rows),
        counted.pick(flat),
        temperature,
        pick_backend(backend, rows.hidden.device),
        memory_budget,
    )
    return counted.put_back(values)


@traceable("hidden", "head", per_row=True)
def sequence_log_prob(
    hidden: Tensor,  # (N, D)
    head: Head,  # (V, D)
    targets: Tensor,  # (N,)
    segment_ids: Tensor,  # (N,) not decreasing; on the CPU or with the hidden states
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
        (S,) fp32 nats, S = `num_segments` (needed under torch.compile, and while a CUDA graph is
        captured with `segment_ids` on the GPU) or the largest segment id + 1; 0 for one without
        rows.

    Raises:
        ValueError, TypeError: as `linear_log_prob`; segment ids that decrease, are negative or
            reach beyond `num_segments`.
    """
    rows = checks.side("", hidden, head)
    segments = checks.segment_ids(segment_ids, rows)
    size = _segments(segments, num_segments)
    values = linear_log_prob(
        hidden,
        head,
        targets,
        temperature=temperature,
        ignore_index=ignore_index,
        backend=backend,
        memory_budget=memory_budget,
    )
    segments = on_device(segments, rows.hidden.device)
    return values.new_zeros(size).index_add(0, segments, values.reshape(-1))


def _segments(ids: Tensor, wanted: int | None) -> int:
    """How many there are."""
    if wanted is not None:
        wanted = checks.integer("num_segments", wanted)
    if devices.capturing(ids.device):
        if wanted is None:
            raise ValueError(
                "num_segments must be given while a CUDA graph is captured, or segment_ids be on "
                "the CPU: the host can't read them from the GPU then"
            )
        return wanted
    least = int(ids[-1]) + 1 if len(ids) else 0
    if wanted is not None and wanted < least:
        raise ValueError(f"num_segments must be at least {least}, got {wanted}")
    return least if wanted is None else wanted
