"""The recipe of docs/backends.md in TRL's DistillationTrainer trains as TRL's own loss does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import error
from datasets import Dataset
from recipes import recipe
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: make test-peers")
from trl import DistillationConfig, DistillationTrainer

pytestmark = pytest.mark.filterwarnings(  # trl's default, by the name that transformers gives up
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
# Of the loss and of the gradients: in half precision the errors of two, all rounded in bf16.
MODES = {"fp32": (1e-5, 2e-5), "bf16": (1e-5, 1.5e-2), "autocast": (2e-4, 1.5e-2)}


def make_trainer(
    kind: Any, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = DistillationConfig(**(defaults | settings))
    student, teacher = tiny.model(0).to(dtype), tiny.model(1, width=48).to(dtype)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)  # sure of itself: the loss is well above rounding errors
    assert student.generation_config is not None
    student.generation_config.eos_token_id = list(range(1, tiny.VOCAB, 4))  # samples end early
    prompts = Dataset.from_list([{"prompt": f"word {i} " * (1 + i % 3)} for i in range(12)])
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    return kind(student, teacher, args, prompts, processing_class=tokenizer)


def fused() -> Any:
    return recipe("FusedDistillationTrainer")


def sampled(tool_mask: bool) -> dict[str, Tensor]:
    """A batch as TRL makes it: prompts padded on the left, completions on the right."""
    random = torch.Generator().manual_seed(3)
    place = torch.arange(5)
    inputs = {
        "prompt_ids": torch.randint(2, 999, (3, 5), generator=random),
        "prompt_mask": (place >= torch.tensor([[0], [3], [1]])).long(),
        "completion_ids": torch.randint(2, 999, (3, 5), generator=random),
        "completion_mask": (place < torch.tensor([[5], [2], [1]])).long(),
    }
    if tool_mask:
        inputs["tool_mask"] = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    return inputs


def one_step(
    kind: Any, folder: Path, mode: str, tool_mask: bool, items: float | None, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """What `_compute_loss` gives, and the gradients: with models in fp32 or bf16, or with models in
    fp32 under autocast. (TRL's `bf16=True` starts no autocast around its loss.)"""
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    trainer = make_trainer(kind, folder, dtype, **settings)
    total = None if items is None else torch.tensor(items)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        results = trainer._compute_loss(trainer.model, sampled(tool_mask), total)
    results[0].backward()
    return *results, [p.grad for p in trainer.model.parameters()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tool_mask", [False, True], ids=["", "tools"])
@pytest.mark.parametrize("items", [None, 17.0], ids=["mean", "global"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 1.5), (1.0, 0.8)])
def test_loss_and_gradients_are_those_of_trl(
    beta: float,
    temperature: float,
    items: float | None,
    tool_mask: bool,
    mode: str,
    tmp_path: Path,
) -> None:
    settings = {"beta": beta, "temperature": temperature}
    theirs, own, whole = (
        one_step(kind, tmp_path, how, tool_mask, items, **settings)
        for kind, how in ((DistillationTrainer, mode), (fused(), mode), (fused(), "fp32"))
    )
    of_loss, of_gradients = MODES[mode]
    assert error(own[0], theirs[0]) < of_loss
    assert own[2] == theirs[2]
    if temperature == 1:
        assert error(own[1], theirs[1]) < of_loss
    for a, b in zip(own[3], theirs[3], strict=True):
        assert error(a, b) < of_gradients
    rounded = max(error(a, b) for a, b in zip(own[3], whole[3], strict=True))
    assert (rounded > 1e-3) == (mode != "fp32")  # half precision was there


@pytest.mark.parametrize("mode", MODES)
def test_the_bounds_see_a_percent(mode: str, tmp_path: Path) -> None:
    """Another beta, by 0.01, or another temperature is far beyond them."""
    settings = {"beta": 0.3, "temperature": 1.5}
    theirs = one_step(DistillationTrainer, tmp_path, mode, True, 17.0, **settings)
    for change in ({"beta": 0.31}, {"temperature": 1.52}):
        other = one_step(fused(), tmp_path, mode, True, 17.0, **(settings | change))
        assert error(other[0], theirs[0]) > 10 * MODES[mode][0]
        assert max(map(error, other[3], theirs[3])) > MODES[mode][1]


@pytest.mark.parametrize("tokens", ["none", "some"])
def test_no_token_counts(tokens: str, tmp_path: Path) -> None:
    """A batch whose completions are masked whole has the loss 0, and its gradients are 0."""
    trainer = make_trainer(fused(), tmp_path)
    inputs = sampled(tool_mask=True)
    if tokens == "none":
        inputs["tool_mask"].zero_()
    loss, entropy, rows = trainer._compute_loss(trainer.model, inputs, None)
    loss.backward()
    is_zero = [not p.grad.any() for p in trainer.model.parameters() if p.grad is not None]
    assert is_zero and all(is_zero) == (tokens == "none")
    assert (loss == 0) == (entropy == 0) == (rows == 0) == (tokens == "none")


@pytest.mark.parametrize(
    ("settings", "mode"),
    [({}, "fp32"), ({"beta": 0.3, "temperature": 1.5}, "fp32"), ({"beta": 0.3}, "bf16")],
    ids=str,
)
def test_trains_to_the_same_weights(settings: dict[str, Any], mode: str, tmp_path: Path) -> None:
    """Sampling, accumulation and checkpointing of activations as TRL does them; bf16 rounds each
    step of the weights, too."""
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    of_norm, of_weights = (1e-5, 1e-3) if mode == "fp32" else (2e-2, 5e-2)
    runs = []
    for kind in (DistillationTrainer, fused()):
        trainer = make_trainer(kind, tmp_path, dtype, **settings)
        trainer.train()
        metrics = trainer.evaluate(trainer.train_dataset.select(range(2)))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((logs, metrics["eval_loss"], list(trainer.model.parameters())))
    theirs, own = runs
    assert len(own[0]) == 3
    assert len({entry["completions/mean_length"] for entry in own[0]}) > 1  # there was padding
    for a, b in zip(own[0], theirs[0], strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=of_norm)
    assert own[1] == pytest.approx(theirs[1], rel=1e-5)
    for a, b, start in zip(own[2], theirs[2], tiny.model(0).to(dtype).parameters(), strict=True):
        assert a.dtype == b.dtype == dtype
        # Adam makes much of small differences
        assert (a - b).norm() <= of_weights * (b - start).norm()
