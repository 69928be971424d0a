"""One micro-batch on fake tensors: its hidden states, and a stand-in for the fused loss.

Sequences go through the body in as many passes as the trainer's, all of them at their longest. The
stand-in allocates what `plan_memory` says that the loss holds: its workspace, and the gradients of
head and hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi.planning.live import Live
from dudi.planning.models import padded
from dudi.signals import causal_lm, lm_head, number_of_groups
from dudi_kernels import plan_memory
from dudi_kernels.cost import MemoryPlan

WORKSPACE, HEAD_GRADIENT = "loss workspace", "gradients of the head"
TEACHING = "teacher activations"
MANY_ROWS = 2**24


class Load(NamedTuple):
    """One micro-batch of one rank."""

    prompts: int  # how many
    prompt_length: int
    completion_length: int
    teacher_prompt_length: int
    sides: int  # responses to each prompt: y+, and all y-
    taught: int  # of them, that the teacher scores
    drawn: int = 0  # sequences that are sampled together

    @property
    def rows(self) -> int:
        return self.prompts * self.sides * self.completion_length


class Precision(NamedTuple):
    autocast: torch.dtype | None

    @contextmanager
    def region(self) -> Iterator[None]:
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            yield


class Loss(NamedTuple):
    """What the fused loss depends on beside the student."""

    device: str
    memory_budget: int
    divergence: str
    teacher: tuple[int, int, torch.dtype] | None  # vocabulary, width, dtype
    together: bool  # whether chunks hold whole pairs


# ---- hidden states -------------------------------------------------------------------------------


def hidden_rows(model: Any, count: int, prompt: int, completion: int) -> Tensor:
    """As `signals.response_hidden`, whose masks have no numbers here: (N, D)."""
    body, rows = causal_lm(model).base_model, []
    groups = number_of_groups(count)
    for size in (count // groups + (i < count % groups) for i in range(groups)):
        ids = torch.zeros(size, prompt + completion, dtype=torch.long)
        with padded(model, size > 1):
            output = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        where = torch.zeros(size * completion, dtype=torch.long)
        rows.append(output.last_hidden_state[where, where])
    return torch.cat(rows)[torch.zeros(count * completion, dtype=torch.long)]


def student_hidden(model: Any, load: Load) -> Tensor:
    count = load.prompts * load.sides
    return hidden_rows(model, count, load.prompt_length, load.completion_length)


def taught_rows(live: Live, load: Load, loss: Loss) -> Tensor | None:
    """What the teacher's pass leaves: (N, E)."""
    if loss.teacher is None:
        return None
    _, width, dtype = loss.teacher
    with live.under(TEACHING):
        return torch.empty(load.rows, width, dtype=dtype)


# ---- the fused loss ------------------------------------------------------------------------------


def log_prob_plan(model: Any, rows: int, loss: Loss, precision: Precision) -> MemoryPlan:
    """Of log-probabilities without gradients."""
    weight = lm_head(model).weight
    return plan_memory(
        rows,
        len(weight),
        weight.shape[1],
        per_row=True,
        dtype=precision.autocast or weight.dtype,
        train_hidden=False,
        train_weight=False,
        device=loss.device,
        memory_budget=loss.memory_budget,
    )


def loss_plan(model: Any, load: Load, loss: Loss, precision: Precision) -> MemoryPlan:
    """Of the three signals. A map between vocabularies may use all of its budget."""
    weight = lm_head(model).weight
    vocabulary, width, dtype = loss.teacher or (len(weight), None, weight.dtype)
    plan_rows = partial(
        plan_memory,
        vocab_size=len(weight),
        width=weight.shape[1],
        teacher_width=width,
        divergence=loss.divergence,
        dtype=precision.autocast or min(weight.dtype, dtype, key=lambda kind: kind.itemsize),
        train_weight=weight.requires_grad,
        device=loss.device,
        memory_budget=loss.memory_budget,
    )
    plan = plan_rows(load.rows)
    if loss.together and plan.strategy == "retain":
        most = plan_rows(MANY_ROWS).chunk_rows  # that a chunk may have
        chunk = _whole_pairs(most, load)
        plan = plan._replace(workspace=plan_rows(chunk).workspace)
    if width is None or vocabulary == len(weight):
        return plan
    more = 2 * load.rows * width * (vocabulary - len(weight))
    return plan._replace(flops=plan.flops + more, workspace=loss.memory_budget)


def _whole_pairs(most: int, load: Load) -> int:
    """Rows of the chunk that holds as many pairs as it can; a part of one that is longer."""
    pair = load.sides * load.completion_length
    return min(load.rows, most // pair * pair or most)


class FusedLoss(torch.autograd.Function):
    """(hidden, weight, plan, live, head) -> a scalar.

    The head's gradient goes to the list `head`, to be held there: autograd adds that of a tied
    embedding to it in place, but would make a third of the two for fake tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        plan: MemoryPlan,
        live: Live,
        head: list[Tensor | None],
    ) -> Tensor:
        ctx.plan, ctx.live, ctx.head, ctx.early = plan, live, head, plan.strategy == "retain"
        ctx.save_for_backward(hidden, weight)
        ctx.made = None
        with _workspace(ctx):
            if ctx.early:
                ctx.made = _gradients(ctx, hidden, weight)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = ctx.saved_tensors
        made, ctx.made = ctx.made, None
        if made is None:
            with _workspace(ctx):
                made = _gradients(ctx, *inputs)
        with ctx.live.under(HEAD_GRADIENT):
            own = [None if g is None else g.to(t.dtype) for g, t in zip(made, inputs, strict=True)]
        ctx.head.append(own[1])
        return own[0], None, None, None, None


@contextmanager
def _workspace(ctx: Any) -> Iterator[None]:
    with ctx.live.under(WORKSPACE):
        held = torch.empty(ctx.plan.workspace, dtype=torch.uint8)
    yield
    del held


def _gradients(ctx: Any, *inputs: Tensor) -> list[Tensor | None]:
    """fp32 sums over chunks of rows; blocks of the vocabulary are written once, in their dtype."""
    with ctx.live.under(HEAD_GRADIENT):
        return [
            torch.empty_like(t, dtype=torch.float32 if ctx.early else t.dtype) if needed else None
            for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
