"""The textbook in float64: dense logits, softmax, autograd. Shares no code with the library.

A divergence is a function of two probability tensors (..., V); gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[..., Tensor]


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum a log(a / b), with 0 log 0 = 0 and a gradient that is not NaN there."""
    there = a > 0
    a_safe = torch.where(there, a, torch.ones_like(a))
    b_safe = torch.where(there, b, torch.ones_like(b))
    return torch.where(there, a_safe * (a_safe.log() - b_safe.log()), 0).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float, alpha: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(p: Tensor, q: Tensor, beta: float, alpha: float) -> Tensor:
    both = alpha + beta

    def power(x: Tensor, exponent: float) -> Tensor:  # a gradient that is not NaN at 0
        there = x > 0
        return torch.where(there, torch.where(there, x, 1.0) ** exponent, 0.0)

    cross = power(p, alpha) * power(q, beta)
    terms = cross - alpha / both * power(p, both) - beta / both * power(q, both)
    return -terms.sum(-1) / (alpha * beta)


def adaptive_share(p: Tensor, q: Tensor, bucket: bool = False) -> Tensor:
    """The head's share of sum |p - q|, by a full sort; equals in the order of the vocabulary. A
    bucket, the last class, is in the tail. 1/2 where there is no gap at all."""
    p, q = p.detach(), q.detach()
    total = (p - q).abs().sum(-1)
    if bucket:
        p, q = p[..., :-1], q[..., :-1]
    p, order = p.sort(dim=-1, descending=True, stable=True)
    head = p.cumsum(-1) <= 0.5
    head[..., 0] = True
    gap = ((p - q.gather(-1, order)).abs() * head).sum(-1)
    return torch.where(total > 0, gap / total, 0.5)


def adaptive_kl(p: Tensor, q: Tensor, bucket: bool = False) -> Tensor:
    a = adaptive_share(p, q, bucket)
    return a * kl(p, q) + (1 - a) * kl(q, p)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": lambda p, q, beta, alpha: kl(p, q),
    "reverse_kl": lambda p, q, beta, alpha: kl(q, p),
    "jeffreys": lambda p, q, beta, alpha: beta * kl(p, q) + (1 - beta) * kl(q, p),
    "adaptive_kl": lambda p, q, beta, alpha: adaptive_kl(p, q),
    "jsd": jsd,
    "alpha_beta": alpha_beta,
    "skew_forward_kl": lambda p, q, beta, alpha: kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda p, q, beta, alpha: kl(q, (1 - alpha) * p + alpha * q),
    "total_variation": lambda p, q, beta, alpha: (p - q).abs().sum(-1) / 2,
}


def bucketed(probs: Tensor, ids: Tensor) -> Tensor:
    """(..., k + 1) what the named tokens have, and the rest."""
    rest = probs.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([probs.gather(-1, ids), rest], -1)


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    out = hidden @ weight.T
    if bias is not None:
        out = out + bias
    if softcap is not None:
        out = softcap * torch.tanh(out / softcap)
    return out * scale


def log_prob(scores: Tensor, targets: Tensor) -> Tensor:
    return scores.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def entropy(scores: Tensor) -> Tensor:
    probs = scores.softmax(-1)
    return -torch.special.xlogy(probs, probs).sum(-1)


def nucleus(scores: Tensor, temperature: float, top_p: float) -> Tensor:
    """-inf for all but the likeliest tokens of this mass, by a full sort."""
    p, order = (scores / temperature).softmax(-1).sort(dim=-1, descending=True)
    out = p.cumsum(-1) - p >= top_p
    return scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)


def dudi(
    scores: Tensor,  # (N, V) float64 logits of the student
    teacher_scores: Tensor | None,
    targets: Tensor,
    segments: Tensor,
    *,
    weights: tuple[float, float, float, float],  # off-policy, on-policy, preference, ce
    divergences: tuple[str, str],
    beta: float,
    alpha: float,
    temperature: float,
    preference_beta: float,
    length_power: int,
    reference: Tensor | str | None,
    denominators: tuple[float | None, float | None, float | None],
    samples: int = 1,  # of each prompt
    kind: str = "sigmoid",
    margin: float = 0.0,
    top: tuple[Tensor, Tensor] | None = None,  # (N, k) ids and log-probabilities of the teacher
    row_weight: Tensor | None = None,  # of the divergence
) -> dict[str, Tensor]:
    """The three signals, one sequence after the other."""
    group = 1 + samples
    prompts = int(segments.max()) // group + 1
    count = group * prompts
    positive = segments % group == 0
    off_rows, on_rows, pairs = (
        own if given is None else given
        for given, own in zip(
            denominators,
            (float(positive.sum()), float((~positive).sum()), prompts * samples),
            strict=True,
        )
    )
    own = log_prob(scores, targets)
    other = torch.zeros_like(own)
    if isinstance(reference, str):
        assert teacher_scores is not None
        other = log_prob(teacher_scores, targets)
    q = (scores / temperature).softmax(-1)
    p = None if teacher_scores is None else (teacher_scores / temperature).softmax(-1)
    if top is not None:
        ids, log_probs = top
        p, q = log_probs.double().exp(), bucketed(q, ids)
        silent = p.sum(-1, keepdim=True) == 0  # nothing is known: taken to agree
        p = torch.where(silent, q.detach(), torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1))
    zero = torch.zeros((), dtype=scores.dtype)
    off = on = ce = preference = zero
    sums: list[Tensor] = []
    references: list[Tensor] = []
    lengths: list[int] = []
    for segment in range(count):
        rows = segments == segment
        sums.append(own[rows].sum())
        if isinstance(reference, Tensor):
            references.append(reference[segment].double())
        else:
            references.append(other[rows].sum())
        lengths.append(max(int(rows.sum()), 1))
        if p is not None:
            name = divergences[segment % group > 0]
            value = DIVERGENCES[name](p[rows], q[rows], beta, alpha)
            if top is not None and name == "adaptive_kl":
                value = adaptive_kl(p[rows], q[rows], bucket=True)
            value = (value if row_weight is None else row_weight[rows] * value).sum()
            off, on = (off + value, on) if segment % group == 0 else (off, on + value)
        if segment % group == 0:
            ce = ce - own[rows].sum()
    ratings = [(sums[s] - references[s]) / lengths[s] ** length_power for s in range(count)]
    margins = []
    for prompt in range(prompts):
        for sample in range(1, group):
            margins.append(ratings[group * prompt] - ratings[group * prompt + sample])
            z = preference_beta * margins[-1] - margin
            match kind:
                case "sigmoid":
                    preference = preference - torch.log(torch.sigmoid(z))
                case "hinge":
                    preference = preference + torch.clamp(1 - z, min=0)
                case "ipo":
                    preference = preference + ((z - 0.5) / preference_beta) ** 2
    parts = {
        "off_policy_loss": off / max(off_rows, 1),
        "on_policy_loss": on / max(on_rows, 1),
        "preference_loss": preference / pairs,
        "ce_loss": ce / max(off_rows, 1),
    }
    loss = sum(
        (weight * part for weight, part in zip(weights, parts.values(), strict=True) if weight),
        zero,
    )
    return {
        "loss": loss,
        **parts,
        "margins": torch.stack(margins),
        "log_probs": torch.stack(sums),
        "reference_log_probs": torch.stack(references),
    }
