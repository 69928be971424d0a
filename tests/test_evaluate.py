"""Held-out figures against a dense, row by row computation in float64."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from dudi import evaluate
from dudi.data import prepare_dataset
from dudi.evaluate import Evaluation, evaluate_model, evaluation_table
from dudi.rollout import Rollout

LENGTH = 48


def prepared(count: int = 12, **settings: Any) -> Dataset:
    """Ragged rows of several languages."""
    return prepare_dataset(tiny.rows(count, "test"), tiny.tokenizer(), **settings)[0]


def log_probs(model: Any, row: dict[str, Any]) -> Tensor:
    """(R, V) of the reference's positions, by the model's own dense forward."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
    return logits.double().log_softmax(-1)


@torch.no_grad()
def dense(model: Any, teacher: Any, dataset: Dataset) -> dict[str, dict[str, float]]:
    sums: dict[str, list[float]] = {}
    for row in list(dataset):
        lq, lp = log_probs(model, row), log_probs(teacher, row)
        targets = torch.tensor(row["completion_ids"])[:, None]
        nll, kl = -lq.gather(1, targets).sum(), (lp.exp() * (lp - lq)).sum()
        own = sums.setdefault(row["language"], [0.0] * 5)
        size = len(row["completion_ids"]), len(row["completion_text"])
        for i, value in enumerate((nll.item(), kl.item(), *size, 1)):
            own[i] += value
    return {
        language: {
            "nll_per_char": nll / chars,
            "nll_per_token": nll / tokens,
            "kl_to_teacher": kl / tokens,
            "rows": rows,
            "tokens": tokens,
            "chars": chars,
        }
        for language, (nll, kl, tokens, chars, rows) in sums.items()
    }


def figures(result: Evaluation) -> dict[str, dict[str, float]]:
    return {
        language: {k: v for k, v in values.items() if k != "chrf"}
        for language, values in result.languages.items()
    }


def sharpened(seed: int) -> Any:
    """A tiny model whose predictions are far from uniform."""
    model = tiny.model(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_matches_the_dense_computation(batch_size: int) -> None:
    """Whatever the batch size, and without the model's own head: no logits."""
    model, teacher, dataset = sharpened(0), sharpened(1), prepared()
    expected = dense(model, teacher, dataset)
    assert len(expected) > 2 and len({len(ids) for ids in dataset["prompt_ids"]}) > 2
    for m in (model, teacher):
        m.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits were made"))
    seen: list[tuple[int, int]] = []
    result = evaluate_model(
        model, tiny.tokenizer(), dataset, teacher=teacher, batch_size=batch_size, generate=False,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    own = figures(result)
    assert own.keys() == expected.keys()
    for language, values in expected.items():
        assert own[language] == pytest.approx(values, rel=1e-5)
        assert values["kl_to_teacher"] > 0.01
    for name in own["en"]:
        mean = sum(v[name] for v in expected.values()) / len(expected)
        assert result.mean[name] == pytest.approx(mean, rel=1e-5)
    assert seen == sorted(seen) and seen[-1] == (12, 12)
    assert result.samples == [] and math.isnan(result.mean["chrf"])


def test_models_are_in_eval_mode_meanwhile() -> None:
    """Dropout of a model in training must not reach the figures, the teacher's neither."""
    models = [sharpened(seed) for seed in (0, 1)]
    dataset = prepared(4)
    expected = evaluate_model(
        models[0].eval(), tiny.tokenizer(), dataset, teacher=models[1].eval(), generate=False
    )
    for model in models:
        model.train()
        model.model.layers[0].self_attn.attention_dropout = 0.9
    result = evaluate_model(models[0], tiny.tokenizer(), dataset, teacher=models[1], generate=False)
    assert figures(result) == figures(expected)
    assert all(model.training and model.model.training for model in models)
    assert all(p.grad is None for model in models for p in model.parameters())


def test_teacher_itself_and_none() -> None:
    model, dataset = tiny.model(), prepared(4)
    own = evaluate_model(model, tiny.tokenizer(), dataset, teacher=model, generate=False)
    assert {v["kl_to_teacher"] for v in own.languages.values()} == {0.0}
    alone = evaluate_model(model, tiny.tokenizer(), dataset, generate=False)
    assert math.isnan(alone.mean["kl_to_teacher"])
    assert alone.mean["nll_per_char"] == pytest.approx(own.mean["nll_per_char"], rel=1e-6)
    told = json.loads(json.dumps(alone.to_dict(), allow_nan=False))
    assert told["mean"]["kl_to_teacher"] is None and told["mean"]["chrf"] is None


def parrot(dataset: Dataset, silent: str = "") -> Any:
    """A stand-in for `generate` that knows the references; `silent` is a language it fails in."""
    known = {
        tuple(row["prompt_ids"]): [1] if row["language"] == silent else row["completion_ids"]
        for row in list(dataset)
    }

    def generate(model: Any, prompts: list[Tensor], **settings: Any) -> Rollout:
        assert settings["temperature"] == 0 and settings["max_completion_length"] == LENGTH
        ids = [torch.tensor(known[tuple(p.tolist())]) for p in prompts]
        return Rollout(ids, ["eos"] * len(ids))

    return generate


@pytest.mark.parametrize("limit", [None, 2, 0])
def test_generations(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """The references themselves score 100 and silence 0; the first rows of each language count."""
    dataset = prepared(36)
    monkeypatch.setattr(evaluate, "generate", parrot(dataset, silent="th"))
    result = evaluate_model(
        tiny.model(), tiny.tokenizer(), dataset, batch_size=7, generate_rows=limit,
        max_completion_length=LENGTH,
    )  # fmt: skip
    if limit == 0:
        assert result.samples == [] and math.isnan(result.mean["chrf"])
        return
    for language, values in result.languages.items():
        assert values["chrf"] == pytest.approx(0 if language == "th" else 100)
        rows = [s["row"] for s in result.samples if s["language"] == language]
        own = [row["row"] for row in list(dataset) if row["language"] == language]
        assert rows == own[:limit]
    sample = result.samples[0]
    assert sample["generation"] == sample["reference"] == dataset[sample["row"]]["completion_text"]
    assert sample["prompt"] == dataset[sample["row"]]["prompt_text"]


def test_truncated_reference_counts_the_characters_that_are_scored() -> None:
    short = prepared(2, max_completion_length=3)
    result = evaluate_model(tiny.model(), tiny.tokenizer(), short, generate=False)
    scored = [
        tiny.tokenizer().decode(ids, skip_special_tokens=True) for ids in short["completion_ids"]
    ]
    assert any(len(a) < len(b) for a, b in zip(scored, short["completion_text"], strict=True))
    assert sum(v["chars"] for v in result.languages.values()) == sum(map(len, scored))


def test_rows_without_language() -> None:
    rows = Dataset.from_dict({"prompt": ["Hello:", "Good"], "completion": [" world", " morning"]})
    dataset, _ = prepare_dataset(rows, tiny.tokenizer())
    result = evaluate_model(
        tiny.model(), tiny.tokenizer(), dataset, generate_rows=1, max_completion_length=4
    )
    assert list(result.languages) == ["all"] and result.mean == pytest.approx(
        result.languages["all"], nan_ok=True
    )
    assert [s["language"] for s in result.samples] == ["all"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": 99}, r"teacher must share the model's vocabulary of 16384, got 99"),
        ({"model": 99}, r"dataset must hold ids of the model's vocabulary of 99, got \d{3,}"),
        ({"dataset": []}, "dataset must not be empty"),
        ({"dataset": [{"prompt": "a"}]}, r"must come from dudi.data.prepare_dataset.*prompt_ids"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"generate_rows": -1}, "generate_rows must not be negative, got -1"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    for name in {"model", "teacher"} & change.keys():
        change = {name: tiny.model(vocab=change[name])}
    arguments = {"model": tiny.model(), "dataset": prepared(1), **change}
    with pytest.raises(ValueError, match=message):
        evaluate_model(tokenizer=tiny.tokenizer(), **arguments)


def test_tables_take_evaluations_and_their_dicts() -> None:
    values = {"nll_per_char": 1.5, "nll_per_token": 5.25, "kl_to_teacher": math.nan, "chrf": 31.25}
    result = Evaluation({"th": values}, values)
    screen = io.StringIO()
    Console(file=screen).print(evaluation_table({"a": result, "b": result.to_dict()}))
    lines = [line.split() for line in screen.getvalue().splitlines() if "1.500" in line]
    assert [line[1::2] for line in lines] == [[n, "1.500", "5.250", "–", "31.2"] for n in "ab"]
