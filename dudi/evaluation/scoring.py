"""Likelihoods of given responses, row by row, through the fused kernels: no logits exist.

NLL is `linear_log_prob`; with a teacher, NLL and forward KL come from one sweep over both heads,
both models under the same prompt, and KL is over the rows that have a partner where the teacher
has another tokenizer. Confidences are the probability of the likeliest token, and whether it is
the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi.bridge import Bridge
from dudi.known import KnownTop
from dudi.sharding import run_inside
from dudi.signals import Packed, lm_head, pack, response_hidden, vocab_size
from dudi.teaching import Responses, make_lesson, teach
from dudi_kernels import likeliest_tokens, linear_distill_loss, linear_log_prob
from dudi_kernels.plan import DEFAULT_BUDGET


class Score(NamedTuple):
    """Of one response."""

    nll: float  # summed, nats
    kl: float  # summed over the rows that are taught; NaN without a teacher
    taught: float
    confidence: Tensor | None  # (R,) of the likeliest tokens
    right: Tensor | None  # (R,) whether they are the response's


@dataclass(frozen=True)
class Scorer:
    """What responses are scored with; `score` takes rows of prompt_ids, completion_ids and, with a
    teacher, plain_prompt_ids."""

    model: Any
    pad: int
    teacher: Any = None
    bridge: Bridge | None = None
    padding_free: bool = False
    memory_budget: int = DEFAULT_BUDGET

    def score(self, rows: Sequence[dict[str, Any]], confidences: bool = False) -> list[Score]:
        def inside() -> list[Score]:
            return self._inside(rows, confidences)

        if self.teacher is None or self.teacher is self.model:
            return run_inside(self.model, inside)
        return run_inside(self.model, lambda: run_inside(self.teacher, inside))

    def _inside(self, rows: Sequence[dict[str, Any]], confidences: bool) -> list[Score]:
        device = next(self.model.parameters()).device
        texts = tensors(rows, "completion_ids")
        packed = pack(tensors(rows, "prompt_ids"), texts, self.pad).to(device)
        hidden = response_hidden(self.model, packed, self.padding_free)
        values = self._values(hidden, packed, rows, texts)
        sums = torch.zeros(len(rows), 3, dtype=torch.float64, device=device)
        sums.index_add_(0, packed.segment_ids, torch.stack(values, 1).double())
        lengths = [len(text) for text in texts]
        sure: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(rows)
        if confidences:
            sure = self._confidences(hidden, packed.targets, lengths)
        return [
            Score(nll, kl, taught, *said)
            for (nll, kl, taught), said in zip(sums.tolist(), sure, strict=True)
        ]

    def _values(
        self, hidden: Tensor, packed: Packed, rows: Sequence[dict[str, Any]], texts: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """NLL, KL and whether it counts, of each token."""
        head = lm_head(self.model)
        taught = torch.ones(len(hidden), device=hidden.device)
        if self.teacher is None or self.teacher is self.model:
            nll = -linear_log_prob(hidden, head, packed.targets, memory_budget=self.memory_budget)
            known = 0.0 if self.teacher is self.model else math.nan
            return nll, torch.full_like(nll, known), taught
        bridge = self.bridge or Bridge(None)
        responses = Responses(texts, list(range(len(rows))), [2 * i for i in range(len(rows))])
        seen = tensors(rows, "plain_prompt_ids")
        lesson = make_lesson(responses, (0,), seen, None, bridge.pairing, self.pad)
        guide = teach(
            self.teacher, lesson, len(hidden), hidden.device, padding_free=self.padding_free
        )
        values = linear_distill_loss(
            hidden,
            head,
            guide.hidden,
            guide.head,
            targets=packed.targets,
            verbalizer=bridge.verbalizer,
            memory_budget=self.memory_budget,
        )
        taught = taught if guide.weight is None else guide.weight
        return -values.log_prob, torch.where(taught > 0, values.divergence, 0), taught

    def _confidences(
        self, hidden: Tensor, targets: Tensor, lengths: list[int]
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        head = lm_head(self.model)
        # topk and a sum in float64 hold copies of a block beside it
        lost = ~hidden.isfinite().all(-1)  # has no likeliest token
        whole = hidden.masked_fill(lost[:, None], 0)
        top = likeliest_tokens(whole, head, 1, memory_budget=self.memory_budget // 4)
        confidence = top.log_probs[:, 0].exp().masked_fill(lost, math.nan).cpu().split(lengths)
        right = (top.ids[:, 0] == targets).cpu().split(lengths)
        return list(zip(confidence, right, strict=True))


def check_vocabulary(
    model: Any, teacher: Any, bridge: Bridge | None, largest: int, what: str
) -> None:
    """Raise ValueError for ids beyond the model's head, and for a teacher's head of another size
    without a map."""
    size = run_inside(model, lambda: vocab_size(model))
    if largest >= size:
        raise ValueError(
            f"{what} must hold ids of the model's vocabulary of {size}, got {largest}: "
            "its tokenizer belongs to another model"
        )
    mapped = bridge is not None and bridge.verbalizer is not None
    if teacher is None or mapped or isinstance(teacher, KnownTop):
        return
    other = run_inside(teacher, lambda: vocab_size(teacher))
    if other != size:
        raise ValueError(f"teacher must share the model's vocabulary of {size}, got {other}")


def check_ids(scorer: Scorer, rows: Sequence[dict[str, Any]], task: str) -> None:
    largest = max(max(row["prompt_ids"] + row["completion_ids"]) for row in rows)
    check_vocabulary(scorer.model, scorer.teacher, scorer.bridge, largest, f"task {task}")


def tensors(rows: Sequence[dict[str, Any]], name: str) -> list[Tensor]:
    return [torch.tensor(row[name], dtype=torch.long) for row in rows]


def batches(
    rows: Sequence[dict[str, Any]], size: int, tell: Callable[[int], None]
) -> Iterator[list[int]]:
    """Numbers of rows of like length together; tells how many each batch was, once it is done."""
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i]["prompt_ids"]) + len(rows[i]["completion_ids"])
    )
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield part
        tell(len(part))
