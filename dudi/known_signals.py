"""The three signals from a teacher that is known by its likeliest tokens.

`linear_dudi_loss` takes a teacher's hidden states. Here the divergences are `linear_distill_loss`
of the rows of y+, and of those of y-, each in a sweep of its own; preference and cross-entropy,
where they are on, are one more. Values and gradients add up to the same loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dudi_kernels import DuDiLoss, LMHead, TopKTeacher, linear_distill_loss, linear_dudi_loss

if TYPE_CHECKING:
    from dudi.bridge import Bridge
    from dudi.config import DuDiConfig
    from dudi.known import KnownTop
    from dudi.teaching import Taught

# what such a teacher can't be asked for, and the value that asks for nothing
NEUTRAL = {
    "temperature": 1.0,
    "teacher_top_p": 1.0,
    "gradient_tolerance": 0.0,
    "verbalized_share": 1.0,
    "confidence_gating": 0.0,
}
DROPPED = ("verbalizer", "teacher_temperature", *list(NEUTRAL)[:3])
PER_ROW = ("divergence", "log_prob", "entropy", "teacher_entropy")


class Known(NamedTuple):
    """The likeliest tokens of some of the student's rows."""

    top: TopKTeacher  # of (P, k)
    rows: Tensor  # (P,)

    @classmethod
    def of(cls, top: TopKTeacher, rows: Tensor, device: torch.device) -> Known:
        return cls(TopKTeacher(top.ids.to(device), top.log_probs.to(device)), rows.to(device))

    def part(self, wanted: Tensor) -> Known:  # (P,) bool
        top = TopKTeacher(self.top.ids[wanted], self.top.log_probs[wanted])
        return Known(top, self.rows[wanted])


def dudi_loss(
    hidden: Tensor,
    head: LMHead,
    taught: Taught | None,
    targets: Tensor,
    segment_ids: Tensor,
    **options: Any,  # of linear_dudi_loss
) -> DuDiLoss:
    """`linear_dudi_loss` with what a teacher says, whichever way it is known."""
    if taught is not None and taught.known is not None:
        return known_dudi_loss(hidden, head, taught.known, targets, segment_ids, **options)
    teacher = (None, None) if taught is None else (taught.hidden, taught.head)
    return linear_dudi_loss(hidden, head, *teacher, targets, segment_ids, **options)


def known_dudi_loss(
    hidden: Tensor,  # (N, D)
    head: LMHead,
    known: Known,
    targets: Tensor,  # (N,)
    segment_ids: Tensor,  # (N,)
    *,
    off_policy_weight: float,
    on_policy_weight: float,
    off_policy_divergence: str,
    on_policy_divergence: str,
    off_policy_rows: float,
    on_policy_rows: float,
    preference_weight: float,
    ce_weight: float,
    divergence_weight: Tensor | None,  # (N,)
    num_generations: int,
    beta: float,
    alpha: float,
    memory_budget: int,
    **options: Any,
) -> DuDiLoss:
    """`linear_dudi_loss` with likeliest tokens in place of hidden states and head."""
    if preference_weight or ce_weight:
        result = linear_dudi_loss(
            hidden,
            head,
            None,
            None,
            targets,
            segment_ids,
            off_policy_weight=0.0,
            on_policy_weight=0.0,
            off_policy_rows=off_policy_rows,
            on_policy_rows=on_policy_rows,
            preference_weight=preference_weight,
            ce_weight=ce_weight,
            num_generations=num_generations,
            memory_budget=memory_budget,
            **{name: value for name, value in options.items() if name not in DROPPED},
        )
    else:
        result = _nothing(segment_ids, num_generations)
    loss, per_row = result.loss, {name: getattr(result, name).clone() for name in PER_ROW}
    drawn = segment_ids[known.rows] % (1 + num_generations) > 0
    parts = []
    for part, weight, divergence, count in (
        (known.part(~drawn), off_policy_weight, off_policy_divergence, off_policy_rows),
        (known.part(drawn), on_policy_weight, on_policy_divergence, on_policy_rows),
    ):
        own = (
            torch.ones_like(per_row["log_prob"]) if divergence_weight is None else divergence_weight
        )
        parts.append(loss.new_zeros(()))
        if not weight:
            continue
        found = linear_distill_loss(
            hidden[part.rows],
            head,
            part.top,
            divergence=divergence,
            beta=beta,
            alpha=alpha,
            token_weight=own[part.rows] / count,
            targets=targets[part.rows],
            memory_budget=memory_budget,
        )
        loss, parts[-1] = loss + weight * found.loss, found.loss.detach()
        for name, values in per_row.items():
            values[part.rows] = getattr(found, name)
    log_probs = torch.zeros_like(result.log_probs)
    log_probs.index_add_(0, segment_ids, per_row["log_prob"])
    return result._replace(
        loss=loss,
        off_policy_loss=parts[0],
        on_policy_loss=parts[1],
        log_probs=log_probs,
        **per_row,
    )


def _nothing(segment_ids: Tensor, num_generations: int) -> DuDiLoss:
    """A loss without signals."""
    rows = torch.zeros(len(segment_ids), device=segment_ids.device)
    prompts = int(segment_ids[-1]) // (1 + num_generations) + 1 if len(rows) else 0
    zero, sequences = rows.new_zeros(()), rows.new_zeros(prompts * (1 + num_generations))
    pairs = rows.new_zeros(prompts * num_generations)
    parts = (zero, zero, zero, zero, zero)
    return DuDiLoss(*parts, pairs, sequences, sequences, rows, rows, rows, rows, zero, zero)


def check_known(teacher: KnownTop, bridge: Bridge, args: DuDiConfig, size: int) -> None:
    """Raise ValueError for what can't be had of a teacher's likeliest tokens."""
    for name, wanted in NEUTRAL.items():
        if getattr(args, name) != wanted:
            raise ValueError(
                f"{name} must be {wanted} with {teacher.what}, whose likeliest tokens alone are "
                f"known, got {getattr(args, name)}"
            )
    if args.teacher_temperature not in (None, 1.0):
        raise ValueError(
            f"teacher_temperature must be 1 with {teacher.what}, got {args.teacher_temperature}"
        )
    if args.preference_weight > 0 and args.reference == "teacher":
        raise ValueError(f"reference must not be 'teacher' with {teacher.what}: use initial")
    if bridge.pairing is not None or args.lexicon is not None:
        raise ValueError(
            f"{teacher.what} must have the student's tokenizer, and there must be no lexicon: its "
            "likeliest tokens are compared as they are"
        )
    if (teacher.vocab_size or 0) > size:
        raise ValueError(
            f"{teacher.what} was cached for a head of {teacher.vocab_size} rows at least, the "
            f"student's has {size}"
        )
