"""The recipe of docs/backends.md in a Hugging Face Trainer trains as the dense loss does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from recipes import recipe
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dudi.callbacks import read_jsonl

SCRIPT = Path(__file__).with_name("hf_train_once.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trains_to_the_same_weights(tmp_path: Path, accumulation: int) -> None:
    runs = []
    for kind in (DenseTrainer, recipe("DistillTrainer")):
        args = tiny.training_arguments(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation
        )
        model: Any = tiny.model(0)
        trainer = kind(model, args, train_dataset=tiny.examples(), teacher=tiny.model(1))
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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_equal_one(tmp_path: Path, accumulation: int) -> None:
    """DDP averages what each rank has divided by the count of all ranks' tokens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, launcher, size in (("one", (), 4), ("two", LAUNCHER, 2)):
        done = subprocess.run(
            [sys.executable, *launcher, SCRIPT, tmp_path / name, str(size), str(accumulation)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in ("one", "two")]
    start = tiny.model(0).parameters()
    for a, b, first in zip(*(m.parameters() for m in models), start, strict=True):
        assert (a - b).norm() < 1e-4 * (a - first).norm()


def test_options_that_need_logits_are_refused(tmp_path: Path) -> None:
    args: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    kind = recipe("DistillTrainer")
    with pytest.raises(ValueError, match="label_smoothing_factor must not be given"):
        kind(
            tiny.model(0),
            TrainingArguments(**args, label_smoothing_factor=0.1),
            teacher=tiny.model(1),
        )
    with pytest.raises(ValueError, match="compute_loss_func must not be given"):
        kind(
            tiny.model(0),
            TrainingArguments(**args),
            teacher=tiny.model(1),
            compute_loss_func=lambda *given, **more: None,
        )
