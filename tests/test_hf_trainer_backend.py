"""The recipe of docs/backends.md in a Hugging Face Trainer trains as the dense loss does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from recipes import recipe
from transformers import Trainer, TrainingArguments


class DenseTrainer(Trainer):
    """The same loss from logits."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs["labels"][:, 1:]
        learnt = labels != -100
        batch = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        lq = model(**batch).logits[:, :-1][learnt].log_softmax(-1)
        with torch.no_grad():
            lp = self.teacher(**batch).logits[:, :-1][learnt].log_softmax(-1)
        total = kwargs.get("num_items_in_batch")
        total = learnt.sum() if total is None else total
        kl = F.kl_div(lq, lp, log_target=True, reduction="sum")
        return (kl + 0.5 * F.nll_loss(lq, labels[learnt], reduction="sum")) / total


def examples(count: int = 12) -> list[dict[str, Any]]:
    """Rows of unequal length, the prompt's labels masked, padded to one length."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = 6 + i % 5
        ids = torch.randint(2, 999, (12,), generator=random)
        mask = (torch.arange(12) < length).long()
        labels = torch.where((mask == 1) & (torch.arange(12) >= 3), ids, -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trains_to_the_same_weights(tmp_path: Path, accumulation: int) -> None:
    runs = []
    for kind in (DenseTrainer, recipe("DistillTrainer")):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        model: Any = tiny.model(0)
        trainer = kind(model, args, train_dataset=examples(), teacher=tiny.model(1))
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((logs, [p.detach().clone() for p in model.parameters()]))
    dense, own = runs
    assert len(own[0]) == 3
    for a, b in zip(own[0], dense[0], strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    for a, b in zip(own[1], dense[1], strict=True):
        assert torch.allclose(a, b, atol=1e-6)
