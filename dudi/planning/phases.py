"""The phases of a training step as DuDiTrainer runs them, on fake tensors, one at a time.

Each gives its peak by part and its FLOPs. What a phase finds in memory and leaves there as it is
(weights, optimizer states, a reference copy) is not in it: `plan_run` adds that. Phases are cached
by what they depend on, so that planning a run again with one setting changed costs little.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    Trainer,
    TrainingArguments,
)

from dudi.planning.live import Live, Peak
from dudi.planning.micro import (
    TEACHING,
    WORKSPACE,
    FusedLoss,
    Load,
    Loss,
    Precision,
    hidden_rows,
    log_prob_plan,
    loss_plan,
    student_hidden,
    taught_rows,
)
from dudi.planning.models import Spec, build, fakes, padded
from dudi.rollout import Finite, inference_mode_of
from dudi.signals import lm_head

WEIGHTS = "weights"  # there before a phase: not among its parts
ACTIVATIONS, ROLLOUTS = "student activations", "rollouts (KV cache, logits)"
GRADIENTS, STATES = "gradients", "optimizer states"
STEPPING = "temporaries of the optimizer"


def _begin(spec: Spec) -> tuple[Any, Live]:
    """A model, and a count of bytes in which its tensors are known."""
    model, live = build(spec), Live()
    live.hold([*model.parameters(), *model.buffers()], WEIGHTS)
    return model, live


def _own(peak: Peak) -> Peak:
    return peak._replace(parts={k: v for k, v in peak.parts.items() if k != WEIGHTS})


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- sampling ------------------------------------------------------------------------------------


class Sampling(NamedTuple):
    temperature: float
    top_p: float
    top_k: int

    def draw(self, logits: Tensor) -> Tensor:
        """A token from logits, as `generate` draws it."""
        scores = logits[:, -1].to(torch.float32, copy=True)
        processors: list[Any] = [Finite()]
        if self.temperature != 1:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        for process in processors:
            scores = process(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)


@lru_cache(maxsize=64)
def sample(spec: Spec, load: Load, precision: Precision, sampling: Sampling) -> Peak:
    """Prefill and the last step of decoding; FLOPs grow evenly from the first step to the last."""
    model, live = _begin(spec)
    steps = load.completion_length - 1

    def extend(cache: Any, length: int, context: int) -> Any:
        ids = torch.zeros(load.drawn, length, dtype=torch.long)
        mask = torch.ones(load.drawn, context + length, dtype=torch.long)
        with precision.region(), padded(model, load.drawn > 1):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        sampling.draw(output.logits)
        return output.past_key_values

    def decode(context: int) -> Peak:
        cache = extend(None, context, 0)
        return live.watch(lambda: extend(cache, 1, context))[1]

    with fakes(), inference_mode_of(model), live, live.under(ROLLOUTS):
        _, prefill = live.watch(lambda: extend(None, load.prompt_length, 0))
        if steps == 0:
            return _own(prefill)
        first = decode(load.prompt_length)
        last = decode(load.prompt_length + steps - 1)
    flops = prefill.flops + steps * (first.flops + last.flops) // 2
    return _own(max(prefill, last, key=lambda peak: peak.bytes))._replace(flops=flops)


# ---- forward passes without gradients ------------------------------------------------------------


class Refinement(NamedTuple):
    """Of what the teacher says."""

    plain: bool  # it reads the student's prompt as well
    mixed: bool  # for all that it scores, not for y+ alone
    gated: bool
    copied: bool  # its rows are put at those of the student


@lru_cache(maxsize=64)
def teach(spec: Spec, load: Load, precision: Precision, refinement: Refinement, loss: Loss) -> Peak:
    """The teacher's hidden states."""
    model, live = _begin(spec)
    count = load.prompts * load.taught
    gate = log_prob_plan(model, load.prompts * load.completion_length, loss, precision)

    def run() -> Tensor:
        hidden = hidden_rows(model, count, load.teacher_prompt_length, load.completion_length)
        if refinement.plain:
            read = count if refinement.mixed else load.prompts
            plain = hidden_rows(model, read, load.prompt_length, load.completion_length)
            if refinement.gated:
                _use(live, gate.workspace)
            if refinement.mixed:
                hidden = torch.lerp(plain, hidden, 0.5)
        if refinement.copied:
            whole = hidden.new_zeros(load.rows, hidden.shape[1])
            return whole.index_copy_(0, torch.zeros(len(hidden), dtype=torch.long), hidden)
        return hidden

    with fakes(), torch.no_grad(), live, live.under(TEACHING), precision.region():
        _, peak = live.watch(run)
    return _own(peak)._replace(flops=peak.flops + 2 * gate.flops * refinement.gated)


@lru_cache(maxsize=64)
def refer(spec: Spec, load: Load, precision: Precision, loss: Loss) -> Peak:
    """The reference policy's log-probabilities."""
    model, live = _begin(spec)
    plan = log_prob_plan(model, load.rows, loss, precision)

    def run() -> Tensor:
        hidden = student_hidden(model, load)
        _use(live, plan.workspace)
        return hidden

    with fakes(), torch.no_grad(), live, live.under(ACTIVATIONS), precision.region():
        taught = taught_rows(live, load, loss)
        _, peak = live.watch(run)
        del taught
    return _own(peak)._replace(flops=peak.flops + plan.flops)


def _use(live: Live, workspace: int) -> None:
    with live.under(WORKSPACE):
        torch.empty(workspace, dtype=torch.uint8)


# ---- forward, loss, backward ---------------------------------------------------------------------


class Step(NamedTuple):
    forward: Peak
    backward: Peak
    loss_flops: int


@lru_cache(maxsize=64)
def forward_backward(
    spec: Spec,
    load: Load,
    precision: Precision,
    loss: Loss,
    accumulates: bool,  # onto the gradients of an earlier micro-batch
) -> Step:
    model, live = _begin(spec)
    plan = loss_plan(model, load, loss, precision)
    trained = _trained(model)
    head: list[Tensor | None] = []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: live.hold([p.grad], GRADIENTS))
        for p in trained
    ]

    def forward() -> Tensor:
        hidden = student_hidden(model, load)
        return FusedLoss.apply(hidden, lm_head(model).weight, plan, live, head)

    try:
        with fakes(), live, live.under(ACTIVATIONS):
            if accumulates:
                _fill(live, trained)
            taught = taught_rows(live, load, loss)
            with precision.region():
                value, first = live.watch(forward)
            _, second = live.watch(value.backward)
            head.clear()
            del taught
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return Step(_own(first), _own(second), plan.flops)


def _fill(live: Live, trained: list[nn.Parameter]) -> None:
    with live.under(GRADIENTS):
        for p in trained:
            p.grad = torch.empty_like(p)


# ---- optimizer -----------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def optimize(spec: Spec, name: str, arguments: str | None) -> Peak:
    """The second step of transformers' optimizer `name`, by when its states are there."""
    model, live = _begin(spec)
    trained = _trained(model)
    try:
        settings = TrainingArguments("unused", optim=name, optim_args=arguments)
        make, options = Trainer.get_optimizer_cls_and_kwargs(settings, model)
        with fakes(), live, live.under(STATES):
            _fill(live, trained)
            optimizer = make(trained, **options)
            optimizer.step()
            with live.under(STEPPING):
                _, peak = live.watch(optimizer.step)
    except (ValueError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        raise ValueError(f"optim {name!r} can't be planned: {error}") from error
    finally:
        model.zero_grad()
    return _own(peak)
