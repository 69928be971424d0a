"""Multiple choice by log-likelihood: the choice whose text the model finds likeliest.

accuracy compares summed log-probabilities, accuracy_by_bytes those divided by the choice's bytes.
The confidence of a question is the softmax over the summed log-probabilities of its choices. A
choice is never cut: the longer ones would be spared what the shorter ones pay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dudi.evaluation.calibration import binned
from dudi.evaluation.encoding import Encoder
from dudi.evaluation.items import Item
from dudi.evaluation.scoring import Scorer, batches, check_ids
from dudi.evaluation.task import Task
from dudi.intervals import or_none


def answer_choices(
    items: Sequence[Item],
    task: Task,
    encoder: Encoder,
    scorer: Scorer,
    batch_size: int,
    tell: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Values of each item's row."""
    encoder = replace(encoder, max_completion_length=None)
    places = [(i, j) for i, item in enumerate(items) for j in range(len(item.choices))]
    rows = [_row(items[i], j, task, encoder) for i, j in places]
    check_ids(scorer, rows, task.name)
    says = [torch.zeros(len(item.choices), dtype=torch.float64) for item in items]
    for part in batches(rows, batch_size, lambda done: None):
        for place, score in zip(part, scorer.score([rows[p] for p in part]), strict=True):
            i, j = places[place]
            says[i][j] = -score.nll
    tell(len(items))
    first = [row for row, (_, j) in zip(rows, places, strict=True) if j == 0]
    return [
        _values(item, own) | {"prompt_left_out": row["left_out"]["prompt_left_out"]}
        for item, own, row in zip(items, says, first, strict=True)
    ]


def _row(item: Item, choice: int, task: Task, encoder: Encoder) -> dict[str, Any]:
    try:
        return encoder.row(item.prompt, item.choices[choice], chat=task.chat, ends=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {task.name}, row {item.row}: {error}") from error


def _values(item: Item, log_probs: torch.Tensor) -> dict[str, Any]:
    sizes = torch.tensor([len(choice.strip().encode()) for choice in item.choices])
    chosen, by_bytes = int(log_probs.argmax()), int((log_probs / sizes).argmax())
    confidence = log_probs.softmax(0).amax()[None]
    known = bool(confidence.isfinite())  # a choice may be impossible, not all of them
    right_one = item.choices[item.answer]  # or another of the same text
    right = item.choices[chosen] == right_one
    return {
        "questions": 1,
        "correct": int(right) if known else None,
        "correct_by_bytes": int(item.choices[by_bytes] == right_one) if known else None,
        "chosen": chosen if known else None,
        "answer": item.answer,
        "log_probs": [or_none(round(v, 6)) for v in log_probs.tolist()],
        "choice_bins": binned(confidence, torch.tensor([right])),
    }
