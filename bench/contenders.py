"""Who is measured: for each contender and task, a function that runs it forward and backward.

A contender is called as its own users would call it. Where its package is absent or it has no such
loss there is no function, and the tables say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems import Problem
from dudi_kernels import (
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
)

Run = Callable[[Problem], Tensor]  # the loss, differentiable

BETA, ALPHA, PREFERENCE_BETA = 0.5, 0.1, 0.1
CHUNK = 2048  # columns of TRL's log-probabilities
KD = (
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation",
    "alpha_beta", "jeffreys",
)  # fmt: skip
ALONE = ("cross_entropy", "log_prob")  # need no teacher
TASKS = (*KD, *ALONE, "three_signals", "rows")


def sides(x: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.hidden, x.weight, x.teacher_hidden, x.teacher_weight


# ---- ours ----------------------------------------------------------------------------------------


def _ours_kd(name: str, backend: str) -> Run:
    settings: dict[str, Any] = {"divergence": name, "beta": BETA, "alpha": ALPHA}
    return lambda x: linear_distill_loss(*sides(x), **settings, backend=backend).loss


def _ours_three(backend: str) -> Run:
    return lambda x: (
        linear_dudi_loss(
            *sides(x),
            x.targets,
            x.segments,
            preference_weight=0.1,
            on_policy_divergence="forward_kl",
            preference_beta=PREFERENCE_BETA,
            backend=backend,
        ).loss
    )


def ours(backend: str) -> dict[str, Run]:
    def alone(x: Problem) -> tuple[Tensor, Tensor, Tensor]:
        return x.hidden, x.weight, x.targets

    return {
        **{name: _ours_kd(name, backend) for name in KD},
        "cross_entropy": lambda x: linear_cross_entropy(*alone(x), backend=backend),
        "log_prob": lambda x: linear_log_prob(*alone(x), backend=backend).mean(),
        "three_signals": _ours_three(backend),
        "rows": lambda x: linear_distill(*sides(x), backend=backend).divergence.mean(),
    }


# ---- dense PyTorch -------------------------------------------------------------------------------


def dense_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32, or float64 for the reference."""
    logits = F.linear(hidden, weight)
    return logits if logits.dtype == torch.float64 else logits.float()


def _dense_kd(name: str) -> Run:
    def run(x: Problem) -> Tensor:
        lq = dense_logits(x.hidden, x.weight).log_softmax(-1)
        lp = dense_logits(x.teacher_hidden, x.teacher_weight).log_softmax(-1)
        return dense_divergence(name, lp, lq).sum(-1).mean()

    return run


def dense_divergence(name: str, lp: Tensor, lq: Tensor) -> Tensor:
    """The textbook, by element; also the float64 reference."""
    p, q = lp.exp(), lq.exp()
    match name:
        case "forward_kl":
            return p * (lp - lq)
        case "reverse_kl":
            return q * (lq - lp)
        case "jeffreys":
            return BETA * p * (lp - lq) + (1 - BETA) * q * (lq - lp)
        case "jsd":
            lm = (BETA * p + (1 - BETA) * q).log()
            return BETA * p * (lp - lm) + (1 - BETA) * q * (lq - lm)
        case "skew_forward_kl":
            return p * (lp - (ALPHA * p + (1 - ALPHA) * q).log())
        case "skew_reverse_kl":
            return q * (lq - ((1 - ALPHA) * p + ALPHA * q).log())
        case "total_variation":
            return (p - q).abs() / 2
        case _:
            both = ALPHA + BETA
            cross = (ALPHA * lp + BETA * lq).exp()
            whole = ALPHA * (both * lp).exp() + BETA * (both * lq).exp() - both * cross
            return whole / (ALPHA * BETA * both)


def preference(log_prob: Tensor, x: Problem) -> Tensor:
    """-log sigmoid(b (log pi(y+) - log pi(y-))), mean over pairs."""
    count = int(x.segments[-1]) + 1
    sums = log_prob.new_zeros(count).index_add(0, x.segments, log_prob)
    return -F.logsigmoid(PREFERENCE_BETA * (sums[0::2] - sums[1::2])).mean()


def with_preference(kd: Run, log_prob: Run) -> Run:
    """KD on the rows of each side, and the preference from log-probabilities: two calls."""

    def run(x: Problem) -> Tensor:
        return 2 * kd(x) + 0.1 * preference(log_prob(x), x)

    return run


def _dense_log_prob(x: Problem) -> Tensor:
    logits = dense_logits(x.hidden, x.weight)
    return logits.log_softmax(-1).gather(-1, x.targets[:, None])[:, 0]


DENSE: dict[str, Run] = {
    **{name: _dense_kd(name) for name in KD},
    "cross_entropy": lambda x: F.cross_entropy(dense_logits(x.hidden, x.weight), x.targets),
    "log_prob": lambda x: _dense_log_prob(x).mean(),
    "three_signals": with_preference(_dense_kd("forward_kl"), _dense_log_prob),
    "rows": _dense_kd("forward_kl"),
}


# ---- peers ---------------------------------------------------------------------------------------

TRAINER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}


def _trl_kd(name: str) -> Run:
    """TRL's chunked divergence, which its DistillationTrainer calls."""

    def run(x: Problem) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        args = (x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None)
        return ChunkedDivergenceFunction.apply(*args, TRAINER_BETA[name], 1.0)[0].mean()

    return run


def _trl_log_prob(x: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rest = (1.0, CHUNK, None, 1.0, ())
    return ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.targets, *rest)[0]


TRL: dict[str, Run] = {
    **{name: _trl_kd(name) for name in TRAINER_BETA},
    "cross_entropy": lambda x: -_trl_log_prob(x).mean(),
    "log_prob": lambda x: _trl_log_prob(x).mean(),
    "three_signals": with_preference(_trl_kd("forward_kl"), _trl_log_prob),
    "rows": _trl_kd("forward_kl"),
}


def _liger_kd(name: str) -> Run:
    def run(x: Problem) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=TRAINER_BETA[name]
        )
        return loss(*sides(x), x.targets)

    return run


LIGER: dict[str, Run] = {
    **{name: _liger_kd(name) for name in TRAINER_BETA},
    "three_signals": with_preference(_liger_kd("forward_kl"), _trl_log_prob),
}

ORDA_NAME = {
    "forward_kl": ("forward", None),
    "reverse_kl": ("reverse", None),
    "jsd": ("skew_js", BETA),
    "skew_forward_kl": ("skew_forward", 1 - ALPHA),
    "skew_reverse_kl": ("skew_reverse", ALPHA),
}


def _orda_kd(name: str) -> Run:
    def run(x: Problem) -> Tensor:
        from orda_kernel import SeparateTeacher, distillation_loss

        kind, share = ORDA_NAME[name]
        return distillation_loss(
            x.hidden,
            x.weight,
            x.targets,
            SeparateTeacher(hidden=x.teacher_hidden, weight=x.teacher_weight),
            student_ce_weight=0.0,
            kl_weight=1.0,
            kl_divergence=kind,
            kl_beta=share,
            backend="auto" if x.hidden.is_cuda else "torch",
        ).loss

    return run


ORDA: dict[str, Run] = {name: _orda_kd(name) for name in ORDA_NAME}


def _cce(x: Problem, reduction: str = "mean") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    kind = "cce" if x.hidden.is_cuda else "torch_compile"
    return cut(x.hidden, x.weight, x.targets, impl=kind, reduction=reduction)


CCE: dict[str, Run] = {
    "cross_entropy": _cce,
    "log_prob": lambda x: -_cce(x, "none").mean(),
}


def _torch_cross_entropy(x: Problem, reduction: str = "mean") -> Tensor:
    """torch's own, in chunks of its choice; without options it is the dense one."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        x.hidden, x.weight, x.targets, reduction=reduction, options=options
    )


TORCH: dict[str, Run] = {
    "cross_entropy": _torch_cross_entropy,
    "log_prob": lambda x: -_torch_cross_entropy(x, "none").mean(),
}

CONTENDERS: dict[str, tuple[tuple[str, ...], dict[str, Run]]] = {  # the packages it needs
    "ours": ((), ours("torch")),
    "ours-triton": (("triton",), ours("triton")),
    "dense": ((), DENSE),
    "trl": (("trl",), TRL),
    "liger": (("liger_kernel", "trl"), LIGER),
    "orda": (("orda_kernel",), ORDA),
    "cut-cross-entropy": (("cut_cross_entropy", "triton"), CCE),
    "torch": ((), TORCH),
}


GPU_ONLY = ("ours-triton",)


def find(contender: str, task: str) -> Run | str:
    """The function, or why there is none."""
    packages, tasks = CONTENDERS[contender]
    if task not in tasks:
        return "has no such loss"
    if contender == "torch" and not hasattr(F, "linear_cross_entropy"):
        return "needs torch 2.13"
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else tasks[task]


def step(run: Run, x: Problem) -> None:
    """Forward and backward, from cleared gradients."""
    x.clear()
    run(x).backward()


def reference(task: str, x: Problem) -> Tensor:
    """The same loss, dense, of float64 inputs."""
    return DENSE[task](x)


def wide(x: Problem) -> Problem:
    """The same numbers in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    teacher = (x.teacher_hidden.double(), x.teacher_weight.double())
    return Problem(hidden, weight, *teacher, x.targets, x.segments)
