"""linear_dudi_loss: off-policy KD, on-policy KD and a sequence preference in one sweep.

Chunks hold whole pairs, so a pair's sequence sums, and with them the coefficient of the preference
on each row, are known while the pair's logits are still in the buffer. A pair longer than a chunk
costs one extra sweep over its own rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dudi_kernels import checks
from dudi_kernels.api import DuDiLoss, Head, _as_side, _backend, _chunks, _plan, _side, _tracked
from dudi_kernels.plan import DEFAULT_BUDGET
from dudi_kernels.sweep import Retain, RowValues, Span, Task

Reference = Tensor | str | None


class Pairs(NamedTuple):
    """Packed rows [y+; y-] [y+; y-] ... and what the preference needs of them."""

    segments: Tensor  # (N,) 2 i for y+ of pair i, 2 i + 1 for y-
    lengths: Tensor  # (S,)
    starts: list[int]  # S + 1 row offsets of the segments
    reference: Tensor | None  # (S,) log-probabilities, or None: the teacher's or none
    beta: float
    length_power: int
    weight: float  # of the preference, divided by the number of pairs

    @property
    def scale(self) -> Tensor:
        """(S,) 1 / |y|^a."""
        return self.lengths.clamp(min=1).float() ** -self.length_power

    def margins(self, log_probs: Tensor, reference: Tensor) -> Tensor:
        """(P,) r(y+) - r(y-) from (S,) sequence log-probabilities."""
        scores = (log_probs - reference) * self.scale
        return scores[0::2] - scores[1::2]

    def coefficients(
        self, start: int, stop: int, log_prob: Tensor, teacher_log_prob: Tensor | None
    ) -> Tensor:
        """(R,) d loss / d log q[target] of the rows of whole pairs."""
        segments = self.segments[start:stop]
        first = int(segments[0]) // 2 * 2
        count = int(segments[-1]) // 2 * 2 + 2 - first
        whole = Pairs(
            segments - first,
            self.lengths[first : first + count],
            [],
            None if self.reference is None else self.reference[first : first + count],
            self.beta,
            self.length_power,
            self.weight,
        )
        sums = _sums(log_prob, whole.segments, count)
        reference = torch.zeros_like(sums) if whole.reference is None else whole.reference
        if teacher_log_prob is not None:
            reference = _sums(teacher_log_prob, whole.segments, count)
        pull = -torch.sigmoid(-self.beta * whole.margins(sums, reference)) * self.beta * self.weight
        sides = torch.stack([pull, -pull], 1).reshape(-1) * whole.scale
        return sides[whole.segments]


def _sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, segments, values)


def _groups(starts: list[int], chunk: int, together: bool) -> list[list[tuple[int, int]]]:
    """Chunks of whole pairs; a pair longer than a chunk is a group of several chunks."""
    stop = starts[-1]
    if not together:
        return [[c] for c in _chunks(0, stop, chunk)]
    groups: list[list[tuple[int, int]]] = []
    bounds = starts[0::2]
    begin = 0
    for a, b in zip(bounds, bounds[1:], strict=False):
        if b - begin > chunk and a > begin:
            groups.append([(begin, a)])
            begin = a
        if b - begin > chunk:
            groups.append(_chunks(begin, b, chunk))
            begin = b
    if begin < stop:
        groups.append([(begin, stop)])
    return groups


def _denominator(name: str, value: float | Tensor | None, own: int) -> float:
    number = float(own if value is None else value)
    if not number >= 0:
        raise ValueError(f"{name} must not be negative or NaN, got {number}")
    return max(number, 1e-30) if value is not None and number > 0 else max(float(own), 1.0)


def _reference(value: Reference, count: int, device: torch.device) -> Tensor | None:
    if value is None or isinstance(value, str):
        checks.one_of("reference_log_prob", value or "teacher", ("teacher",))
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"reference_log_prob must be a tensor or 'teacher', got {type(value).__name__}")
    if value.numel() != count and value.numel() != count - 1:
        raise ValueError(f"reference_log_prob must have shape ({count},), got {tuple(value.shape)}")
    flat = value.detach().float().reshape(-1).to(device)
    return F.pad(flat, (0, count - flat.numel()))  # a last y- without rows


def linear_dudi_loss(
    student_hidden: Tensor,  # (N, D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor | None,  # (N, E)
    teacher_head: Head | None,  # (V, E)
    targets: Tensor,  # (N,)
    segment_ids: Tensor,  # (N,)
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
    preference_beta: float = 0.1,
    preference_length_power: int = 0,
    reference_log_prob: Reference = None,
    off_policy_rows: float | Tensor | None = None,
    on_policy_rows: float | Tensor | None = None,
    pairs: float | Tensor | None = None,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> DuDiLoss:
    """The three signals of DuDi over packed pairs of responses, in one sweep.

    Replaces, with `y+` the rows of even segments and `y-` those of odd ones::

        D_off, D_on = divergence_off(p, q)[y+].sum(-1), divergence_on(p, q)[y-].sum(-1)
        logp = log_softmax(student_logits, -1).gather(-1, targets[:, None])[:, 0]
        score = (segment_sum(logp) - reference_log_prob) / lengths ** preference_length_power
        z = preference_beta * (score[0::2] - score[1::2])
        loss = (
            off_policy_weight * D_off.sum() / off_policy_rows
            + ce_weight * -logp[y+].sum() / off_policy_rows
            + on_policy_weight * D_on.sum() / on_policy_rows
            + preference_weight * -logsigmoid(z).sum() / pairs
        )

    Args:
        teacher_hidden, teacher_head: None where no divergence and no reference needs a teacher.
        segment_ids: which sequence a row belongs to, not decreasing: 2 i is y+ of pair i, 2 i + 1 is
            y-. Sequences may be missing as long as no preference is asked for.
        preference_length_power: 0 or 1, the a in r(y) = (log pi - log pi_ref) / |y|^a.
        reference_log_prob: (S,) nats under a frozen policy, "teacher" for the teacher's own at no
            extra forward, or None for no reference.
        off_policy_rows, on_policy_rows, pairs: denominators over the global batch (all ranks and
            accumulation steps); None means the counts in this call.
        memory_budget: bytes of workspace beyond the gradients.

    Returns:
        `DuDiLoss`. The parts are unweighted, with the same denominators.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that don't fit; an incomplete
            pair with a preference; no teacher where one is needed.

    Sources: DuDi, arXiv 2606.04694 (abstract; the formulas are this project's own); SPIN, 2401.01335;
    GKD, 2306.13649.
    """
    student = _side("student", student_hidden, student_head)
    flat = checks.targets(targets, student, None)
    segments = checks.segment_ids(segment_ids, student)
    for name, value in (
        ("off_policy_weight", off_policy_weight),
        ("on_policy_weight", on_policy_weight),
        ("preference_weight", preference_weight),
        ("ce_weight", ce_weight),
    ):
        checks.number(name, value, 0, float("inf"))
    checks.number("preference_beta", preference_beta, 0, float("inf"), open_ends=True)
    if preference_length_power not in (0, 1):
        raise ValueError(f"preference_length_power must be 0 or 1, got {preference_length_power}")
    checks.temperature("temperature", temperature)
    chosen = (
        checks.divergence("off_policy_divergence", off_policy_divergence, beta, alpha),
        checks.divergence("on_policy_divergence", on_policy_divergence, beta, alpha),
    )
    from_teacher = isinstance(reference_log_prob, str) and preference_weight > 0
    teacher = None
    if off_policy_weight or on_policy_weight or from_teacher:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError("teacher_hidden and teacher_head must be given: a signal needs them")
        teacher = _side("teacher", teacher_hidden, teacher_head)
        checks.same_rows(student, teacher)

    device = student.hidden.device
    count = 2 * (int(segments[-1]) // 2 + 1) if len(segments) else 0
    lengths = torch.bincount(segments, minlength=count)
    starts = [0, *lengths.cumsum(0).tolist()]
    if preference_weight > 0 and bool((lengths == 0).any()):
        i = int((lengths == 0).nonzero()[0])
        raise ValueError(f"segment_ids must give both sides of each pair, got no row of segment {i}")
    even = segments % 2 == 0
    off_rows = _denominator("off_policy_rows", off_policy_rows, int(even.sum()))
    on_rows = _denominator("on_policy_rows", on_policy_rows, int((~even).sum()))
    pair_count = _denominator("pairs", pairs, count // 2)
    layout = Pairs(
        segments,
        lengths,
        starts,
        _reference(reference_log_prob, count, device),
        preference_beta,
        preference_length_power,
        preference_weight / pair_count,
    )
    weight = torch.where(even, off_policy_weight / off_rows, on_policy_weight / on_rows)
    pull = torch.where(even, -ce_weight / off_rows, 0.0)

    def coefficients(a: int, b: int, log_prob: Tensor, teacher_log_prob: Tensor | None) -> Tensor:
        if preference_weight == 0:
            return pull[a:b]
        return pull[a:b] + layout.coefficients(a, b, log_prob, teacher_log_prob)

    parts: dict[str, Tensor] = {}

    def combine(values: RowValues) -> Tensor:
        own = _combined(values, layout, even, from_teacher, off_rows, on_rows, pair_count)
        parts.update(own)
        weights = (off_policy_weight, on_policy_weight, preference_weight, ce_weight)
        names = ("off_policy_loss", "on_policy_loss", "preference_loss", "ce_loss")
        terms = [w * own[name] for w, name in zip(weights, names, strict=True) if w]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=device)

    plan = _plan(student, teacher, memory_budget)
    weights = (off_policy_weight, on_policy_weight)
    task = Task(
        student=_as_side(student),
        teacher=None if teacher is None else _as_side(teacher),
        targets=flat,
        weight=weight.float(),
        spans=[
            Span(starts[s], starts[s + 1], *chosen[s % 2])
            for s in range(count)
            if weights[s % 2] > 0 and starts[s + 1] > starts[s]
        ],
        groups=_groups(starts, plan.chunk_rows, preference_weight > 0),
        coefficients=coefficients if preference_weight or ce_weight else None,
        teacher_log_prob=from_teacher,
        inv_tau=1 / temperature,
        plan=plan,
        needs=_tracked(student.hidden, student.head.weight, student.head.bias),
    )
    head = student.head
    loss, *outputs = Retain.apply(
        student.hidden, head.weight, head.bias, task, _backend(backend), combine
    )
    values = RowValues(*outputs)
    return DuDiLoss(
        loss=loss,
        **parts,
        divergence=values.divergence,
        log_prob=values.log_prob,
        entropy=values.entropy,
        teacher_entropy=values.teacher_entropy,
    )


def _combined(
    values: RowValues,
    layout: Pairs,
    even: Tensor,
    from_teacher: bool,
    off_rows: float,
    on_rows: float,
    pair_count: float,
) -> dict[str, Tensor]:
    """Each signal's value and the sequences' log-probabilities."""
    count = len(layout.lengths)
    log_probs = _sums(values.log_prob, layout.segments, count)
    reference = layout.reference
    if from_teacher:
        reference = _sums(values.teacher_log_prob, layout.segments, count)
    elif reference is None:
        reference = torch.zeros_like(log_probs)
    margins = layout.margins(log_probs, reference)
    return {
        "off_policy_loss": values.divergence[even].sum() / off_rows,
        "on_policy_loss": values.divergence[~even].sum() / on_rows,
        "preference_loss": -F.logsigmoid(layout.beta * margins).sum() / pair_count,
        "ce_loss": -values.log_prob[even].sum() / off_rows,
        "margins": margins,
        "log_probs": log_probs,
        "reference_log_probs": reference,
    }
