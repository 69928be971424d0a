"""linear_dudi_loss: off-policy KD, on-policy KD and a sequence preference in one sweep.

Chunks hold whole pairs, so a pair's sequence sums, and with them the coefficient of the preference
on each row, are known while the pair's logits are still in the buffer. A pair that the budget can't
hold costs one extra sweep over its own rows.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dudi_kernels import checks, devices
from dudi_kernels.checks import Head, Rows
from dudi_kernels.classes import Classes
from dudi_kernels.compiled import traceable
from dudi_kernels.divergences import Measure
from dudi_kernels.plan import DEFAULT_BUDGET, Plan
from dudi_kernels.preference import PREFERENCES, Packing, Preference
from dudi_kernels.prepare import (
    as_side,
    make_plan,
    on_device,
    pick_backend,
    scalar,
    wanted_gradients,
    with_low,
)
from dudi_kernels.sweep import Chunk, RowValues, Span, Task, chunks, even
from dudi_kernels.topk import Top, TopKTeacher
from dudi_kernels.verbalizer import Verbalizer

Reference = Tensor | str | None
Denominator = float | Tensor | None


class DuDiLoss(NamedTuple):
    loss: Tensor  # () fp32, differentiable; all else is fp32 and detached
    off_policy_loss: Tensor  # () mean divergence over the rows of y+
    on_policy_loss: Tensor  # () mean divergence over the rows of y-
    preference_loss: Tensor  # () mean over pairs
    ce_loss: Tensor  # () mean over the rows of y+
    margins: Tensor  # (P,) r(y+) - r(y-), before preference_beta
    log_probs: Tensor  # (S,) of each sequence under the student
    reference_log_probs: Tensor  # (S,) zeros where there is no reference
    divergence: Tensor  # (N,) 0 where its signal is off
    log_prob: Tensor  # (N,)
    entropy: Tensor  # (N,)
    teacher_entropy: Tensor  # (N,) 0 where its signal is off
    skipped: Tensor  # () share of the logits whose gradient was left out
    dropped: Tensor  # () bound on what was left out, at most gradient_tolerance


class Weights(NamedTuple):
    """Of the signals, and the denominators of their means."""

    off_policy: float
    on_policy: float
    preference: float
    ce: float
    off_rows: float | Tensor
    on_rows: float | Tensor
    pairs: float | Tensor
    row: Tensor | None  # (N,) of each row's divergence; None: ones

    def divergence(self, positive: Tensor) -> Tensor:  # (N,)
        """Of each row's divergence in the loss."""
        own = torch.where(positive, self.off_policy / self.off_rows, self.on_policy / self.on_rows)
        return own if self.row is None else own * self.row

    def weighted(self, divergence: Tensor) -> Tensor:  # (N,)
        """Each row's divergence by its own weight."""
        if self.row is None:
            return divergence
        return torch.where(self.row == 0, 0, self.row * divergence)  # no 0 * inf


class Guide(NamedTuple):
    """What the divergences compare the student with: one side, or a few tokens, or nothing."""

    teacher: Rows | None = None
    classes: Classes | None = None  # that they are over; None: the vocabulary
    top: Top | None = None
    top_p: float = 1.0


@traceable("student_hidden", "student_head", result=DuDiLoss)
def linear_dudi_loss(
    student_hidden: Tensor,  # (N, D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor | TopKTeacher | None,  # (N, E)
    teacher_head: Head | None,  # (V, E)
    targets: Tensor,  # (N,)
    segment_ids: Tensor,  # (N,) on the CPU or with the hidden states
    *,
    off_policy_weight: float = 1.0,
    on_policy_weight: float = 1.0,
    preference_weight: float = 0.0,
    ce_weight: float = 0.0,
    off_policy_divergence: str = "forward_kl",
    on_policy_divergence: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    preference_loss: str = "sigmoid",
    preference_beta: float = 0.1,
    preference_margin: float = 0.0,
    preference_length_power: int = 0,
    reference_log_prob: Reference = None,  # (S,)
    off_policy_rows: Denominator = None,
    on_policy_rows: Denominator = None,
    pairs: Denominator = None,
    num_pairs: int | None = None,
    num_generations: int = 1,
    gradient_tolerance: float = 0.0,
    divergence_weight: Tensor | None = None,  # (N,)
    teacher_top_p: float = 1.0,
    verbalizer: Verbalizer | None = None,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> DuDiLoss:
    """The three signals of DuDi over packed pairs of responses, in one sweep.

    Replaces, with `y+` the rows of even segments and `y-` those of odd ones (and so on for more
    samples of a prompt)::

        if isinstance(teacher_hidden, TopKTeacher):        # k classes, and one of what is left
            p, q = teacher_hidden.log_probs.exp(), q.gather(-1, teacher_hidden.ids)
            p, q = (cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        D_off, D_on = divergence_off(p, q)[y+].sum(-1), divergence_on(p, q)[y-].sum(-1)
        D_off, D_on = divergence_weight[y+] * D_off, divergence_weight[y-] * D_on
        logp = log_softmax(student_logits, -1).gather(-1, targets[:, None])[:, 0]
        score = (segment_sum(logp) - reference_log_prob) / lengths ** preference_length_power
        z = preference_beta * (score[0::2] - score[1::2]) - preference_margin
        loss = (
            off_policy_weight * D_off.sum() / off_policy_rows
            + ce_weight * -logp[y+].sum() / off_policy_rows
            + on_policy_weight * D_on.sum() / on_policy_rows
            + preference_weight * -logsigmoid(z).sum() / pairs
        )

    Gradients reach the student's hidden states and head, and only what requires them is allocated;
    teacher and reference get none. They are made in the forward call, so `backward` works once.

    Args:
        teacher_hidden, teacher_head: None where no divergence and no reference needs a teacher;
            unread then. Or a `TopKTeacher` of all N rows, and None: divergences are then over its
            tokens and one bucket with the rest of the vocabulary, at temperature 1, and rows that
            it says nothing of (`TopKTeacher.spread`) have none; "teacher" can't be the reference.
        segment_ids: which sequence a row belongs to, not decreasing: 2 i is y+ of prompt i, 2 i + 1
            is y-; with G = `num_generations` samples of each prompt, (1 + G) i is y+, and the G
            numbers that follow are the y-, each of which makes a pair with it. Sequences may be
            missing as long as no preference is asked for. They must be on the CPU while a CUDA
            graph is captured, which then is of these lengths.
        on_policy_divergence: here reverse KL and no preference are the defaults; the trainer's own
            are forward KL and a preference_weight of 0.1.
        temperature: of the divergences, or of the student's side of them where
            `teacher_temperature` is given; log-probabilities and entropies are at 1.
        preference_loss: of z as above: sigmoid, -logsigmoid(z); hinge, relu(1 - z); ipo,
            ((z - 1/2) / preference_beta)^2, whose length power is 1 in its source.
        preference_margin: how far y+ shall be ahead, gamma of SimPO; for no reference above all.
        preference_length_power: 0 or 1, the a in r(y) = (log pi - log pi_ref) / |y|^a.
        reference_log_prob: (S,) nats under a frozen policy (a last y- without rows may be left
            out), "teacher" for the teacher's own at no extra forward, or None for no reference.
        off_policy_rows, on_policy_rows, pairs: denominators over the global batch (all ranks and
            accumulation steps); None means the counts in this call.
        num_pairs: how many pairs there are, the last ones perhaps without rows; by default what the
            segment ids say. Needed under torch.compile.
        gradient_tolerance: as in `linear_distill_loss`; a row's weight is that of its divergence
            and of its log-probability in the loss.
        divergence_weight: of each row's divergence alone, on top of its signal's weight, for rows
            that the teacher says less about, or (0) nothing; None is 1. It does not change the
            denominators.
        teacher_top_p: as in `linear_distill_loss`; "teacher" can't be the reference below 1.
        verbalizer: as in `linear_distill_loss`; "teacher" can't be the reference then.
        memory_budget: bytes of workspace beyond the gradients.

    Returns:
        `DuDiLoss`. The parts are unweighted, with the same denominators; P counts pairs, S
        sequences, and per-row results have the leading shape of `student_hidden`; the divergence of
        a row is without its weight.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that don't fit; an
            incomplete pair with a preference; no teacher where one is needed.

    Sources: DuDi, arXiv 2606.04694 (its abstract; the formulas are this project's own); SPIN,
    2401.01335; GKD, 2306.13649; DPO, 2305.18290; SLiC-HF, 2305.10425 (hinge); IPO, 2310.12036;
    SimPO, 2405.14734 (margin).
    """
    student = with_low(checks.side("student", student_hidden, student_head))
    flat = checks.targets(targets, student, None)
    ids = checks.segment_ids(segment_ids, student)
    samples = checks.integer("num_generations", num_generations, 1)
    packing = _packing(ids, student.hidden.device, num_pairs, samples)
    off_policy_weight, on_policy_weight, preference_weight, ce_weight = _weights(
        off_policy_weight=off_policy_weight,
        on_policy_weight=on_policy_weight,
        preference_weight=preference_weight,
        ce_weight=ce_weight,
    )
    measures = (
        checks.divergence("off_policy_divergence", off_policy_divergence, beta, alpha),
        checks.divergence("on_policy_divergence", on_policy_divergence, beta, alpha),
    )
    temperatures = checks.temperatures(temperature, teacher_temperature)
    checks.one_of("preference_loss", preference_loss, PREFERENCES)
    preference_beta = checks.number("preference_beta", preference_beta, 0, math.inf, ends=False)
    margin = checks.number("preference_margin", preference_margin, -math.inf, math.inf)
    checks.gradient_tolerance(gradient_tolerance, student)
    top_p = checks.top_p(teacher_top_p, student)
    if isinstance(preference_length_power, bool) or preference_length_power not in (0, 1):
        raise ValueError(f"preference_length_power must be 0 or 1, got {preference_length_power}")
    if preference_weight > 0:
        _check_pairs(packing)
    positives, ones = packing.positives, torch.ones(len(flat), device=flat.device)
    weights = Weights(
        off_policy_weight,
        on_policy_weight,
        preference_weight,
        ce_weight,
        _denominator("off_policy_rows", off_policy_rows, positives),
        _denominator("on_policy_rows", on_policy_rows, len(flat) - positives),
        _denominator("pairs", pairs, packing.pairs),
        _divergence_weight(divergence_weight, student),
    )
    preference = Preference(
        packing,
        _reference(reference_log_prob, packing, student),
        from_teacher=isinstance(reference_log_prob, str) and preference_weight > 0,
        kind=PREFERENCES[preference_loss],
        beta=preference_beta,
        margin=margin,
        scale=packing.sums(ones).clamp(min=1) ** -preference_length_power,
        weight=preference_weight / weights.pairs,
    )
    guide = Guide(top_p=top_p)
    if off_policy_weight or on_policy_weight or preference.from_teacher:
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
            guide = guide._replace(top=top)
        else:
            teacher, classes = _teacher(student, teacher_hidden, teacher_head, verbalizer)
            guide = guide._replace(teacher=teacher, classes=classes)
            checks.exact(gradient_tolerance, classes)
            _check_measures(measures, (off_policy_weight, on_policy_weight), classes, top_p)
        _check_reference(preference, guide)
    signals = _Signals(weights, packing, preference)
    engine = pick_backend(backend, student.hidden.device)
    task = signals.task(
        student,
        guide,
        flat,
        measures,
        temperatures,
        engine,
        memory_budget,
        gradient_tolerance,
    )
    loss, values, skipped = scalar(student, task, signals.combine, engine, memory_budget)
    per_row = (values.divergence, values.log_prob, values.entropy, values.teacher_entropy)
    return DuDiLoss(
        loss, *signals.parts, *(v.view(student.shape) for v in per_row), **skipped._asdict()
    )


class _Signals:
    """What the sweep needs of the signals, and what the loss makes of its results."""

    def __init__(self, weights: Weights, packing: Packing, preference: Preference):
        self.weights, self.packing, self.preference = weights, packing, preference
        self.parts: tuple[Tensor, ...] = ()  # of DuDiLoss, in its order

    def task(
        self,
        student: Rows,
        guide: Guide,
        targets: Tensor,
        measures: tuple[Measure, Measure],  # of y+, of y-
        temperatures: tuple[float, float],  # the student's, the teacher's
        backend: ModuleType,
        memory_budget: int,
        tolerance: float,
    ) -> Task:
        w, packing = self.weights, self.packing
        learner = as_side(student)
        teacher = None if guide.teacher is None else as_side(guide.teacher)
        plan = make_plan(
            learner,
            teacher,
            list(measures),
            backend,
            memory_budget,
            skips=tolerance > 0,
            classes=guide.classes,
            top_p=guide.top_p,
            top=guide.top,
        )
        positive = packing.positive
        return Task(
            student=learner,
            teacher=teacher,
            targets=targets,
            weight=w.divergence(positive),
            spans=_spans(packing, (w.off_policy, w.on_policy), measures),
            groups=_groups(packing, plan, together=w.preference > 0),
            coefficient=torch.where(positive, -w.ce / w.off_rows, 0.0) if w.ce else None,
            coefficients=self.preference.coefficients if w.preference else None,
            teacher_log_prob=self.preference.from_teacher,
            inv_tau=1 / temperatures[0],
            teacher_inv_tau=1 / temperatures[1],
            plan=plan,
            needs=wanted_gradients(student),
            tolerance=tolerance,
            classes=guide.classes,
            teacher_top_p=guide.top_p,
            top=guide.top,
        )

    def combine(self, values: RowValues) -> Tensor:
        """The loss; its parts go to `self.parts`."""
        w, positive = self.weights, self.packing.positive
        divergence = w.weighted(values.divergence)
        margins, *sums = self.preference.margins(values.log_prob, values.teacher_log_prob)
        parts = (
            torch.where(positive, divergence, 0).sum() / w.off_rows,
            torch.where(positive, 0, divergence).sum() / w.on_rows,
            self.preference.loss(margins).sum() / w.pairs,
            -torch.where(positive, values.log_prob, 0).sum() / w.off_rows,
        )
        self.parts = (*parts, margins, *sums)
        loss = values.log_prob.new_zeros(())
        for weight, part in zip(
            (w.off_policy, w.on_policy, w.preference, w.ce), parts, strict=True
        ):
            if weight:  # no 0 * inf
                loss = loss + weight * part
        return loss


def _weights(**given: float) -> list[float]:
    return [checks.number(name, value, 0, math.inf) for name, value in given.items()]


def _packing(ids: Tensor, device: torch.device, num_pairs: int | None, samples: int) -> Packing:
    if devices.capturing(ids.device):
        raise ValueError(
            "segment_ids must be on the CPU while a CUDA graph is captured: the lengths of the "
            "sequences say what is launched, and the host can't read them from the GPU then"
        )
    group = 1 + samples
    least = int(ids[-1]) // group + 1 if len(ids) else 0  # prompts
    pairs = least * samples
    if num_pairs is not None:
        pairs = checks.integer("num_pairs", num_pairs, pairs)
        if pairs % samples:
            raise ValueError(
                f"num_pairs must be a multiple of num_generations={samples}, got {num_pairs}"
            )
    count = pairs // samples * group
    lengths = torch.bincount(ids, minlength=count)
    return Packing(on_device(ids, device), count, [0, *lengths.cumsum(0).tolist()], group)


def _check_pairs(packing: Packing) -> None:
    for segment, (a, b) in enumerate(pairwise(packing.starts)):
        if a == b:
            raise ValueError(
                "segment_ids must give both sides of each pair with preference_weight > 0, "
                f"got no row of segment {segment}"
            )


def _denominator(name: str, value: Denominator, own: int) -> float | Tensor:
    """A global count; one that is 0 has no rows to divide. It stays on the device where the host
    can't read it, so that a replay of a CUDA graph takes the count of its own."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
        if devices.capturing(value.device):
            count = value.detach().reshape(()).float()
            return torch.where(count == 0, 1, count)
        value = value.item()
    number = checks.number(name, own if value is None else value, 0, math.inf)
    if number == 0 and own > 0:
        raise ValueError(f"{name} must be positive with {own} of them in this call, got {number}")
    return number or 1.0


def _reference(value: Reference, packing: Packing, student: Rows) -> Tensor:
    count, device = packing.sequences, student.hidden.device
    if value is None or isinstance(value, str):
        if value is not None:
            checks.one_of("reference_log_prob", value, ("teacher",))
        return torch.zeros(count, device=device)
    if not isinstance(value, Tensor):
        got = type(value).__name__
        raise TypeError(f"reference_log_prob must be a tensor, 'teacher' or None, got {got}")
    absent = count > 0 and packing.starts[-1] == packing.starts[-2]  # a last y- without rows
    if value.ndim != 1 or len(value) not in ((count, count - 1) if absent else (count,)):
        raise ValueError(f"reference_log_prob must have shape ({count},), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(
            f"reference_log_prob must be on {device} as the rows are, got {value.device}"
        )
    if value.is_complex():
        raise TypeError(f"reference_log_prob must be real numbers, got {value.dtype}")
    own = value.detach().float()
    if (i := checks.first(~(own < math.inf))) is not None:
        raise ValueError(
            f"reference_log_prob must be finite or -inf, got {float(own[i])} of sequence {i}"
        )
    return F.pad(own, (0, count - len(value)))


def _teacher(
    student: Rows, hidden: Tensor | None, head: Head | None, verbalizer: Verbalizer | None
) -> tuple[Rows, Classes | None]:
    for name, value in (("teacher_hidden", hidden), ("teacher_head", head)):
        if value is None:
            raise ValueError(f"{name} must be given where a signal or the reference needs it")
    assert hidden is not None and head is not None
    teacher = checks.side("teacher", hidden, head)
    teacher, classes = checks.pair_of_sides(student, teacher, verbalizer)
    return with_low(teacher), classes


def _divergence_weight(value: Tensor | None, student: Rows) -> Tensor | None:
    return None if value is None else checks.row_weight("divergence_weight", value, student)


def _check_measures(
    measures: tuple[Measure, Measure],
    weights: tuple[float, float],
    classes: Classes | None,
    top_p: float,
) -> None:
    names = ("off_policy_divergence", "on_policy_divergence")
    for name, measure, weight in zip(names, measures, weights, strict=True):
        if weight:
            checks.finite_measure(name, measure, classes, top_p)


def _check_reference(preference: Preference, guide: Guide) -> None:
    if not preference.from_teacher:
        return
    if guide.top is not None:
        raise ValueError(
            "reference_log_prob must not be 'teacher' with a TopKTeacher: targets that are not "
            "among its tokens have no log-probability"
        )
    if guide.classes is not None:
        raise ValueError(
            "reference_log_prob must not be 'teacher' with a verbalizer that maps tokens: the "
            "teacher's log-probabilities are of its own"
        )
    if guide.top_p < 1:
        raise ValueError(
            f"reference_log_prob must not be 'teacher' with teacher_top_p={guide.top_p}: targets "
            "outside of what the teacher is restricted to have no log-probability"
        )


def _spans(
    packing: Packing, weights: tuple[float, float], measures: tuple[Measure, Measure]
) -> list[Span]:
    """Runs of y+ and of y- rows, where their signal is on."""
    return [
        Span(a, b, measures[packing.side(segment)])
        for segment, (a, b) in enumerate(pairwise(packing.starts))
        if b > a and weights[packing.side(segment)] > 0
    ]


def _groups(packing: Packing, plan: Plan, together: bool) -> list[list[Chunk]]:
    """Chunks of whole prompts; one that the budget can't hold is a group of several chunks."""
    starts, size = packing.starts, plan.chunk_rows
    if not together:
        return [[chunk] for chunk in chunks(0, starts[-1], even(starts[-1], size))]
    groups: list[list[Chunk]] = []
    begin = 0
    for a, b in pairwise(starts[:: packing.group]):  # of prompts
        if b - begin > size and a > begin:
            groups.append([(begin, a)])
            begin = a
        if b - begin > size:
            whole = b - begin <= plan.most_rows
            groups.append([(begin, b)] if whole else chunks(begin, b, size))
            begin = b
    if begin < starts[-1]:
        groups.append([(begin, starts[-1])])
    return groups
