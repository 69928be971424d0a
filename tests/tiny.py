"""Tiny models, data and configs that the trainer's tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from dudi.callbacks import read_jsonl
from dudi.config import DuDiConfig
from dudi.demo_data import data_path, translation_rows

VOCAB = 16_384


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(data_path("tokenizer"))


def model(
    seed: int = 0, width: int = 32, vocab: int = VOCAB, layers: int = 1, tied: bool = True
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def rows(count: int = 24, split: str = "train") -> Dataset:
    return Dataset.from_list(translation_rows(split)[:count])


def write_inputs(folder: Path, teacher_tokenizer: Any = None) -> dict[str, str]:
    """A student, a teacher and a dataset on disk; the options that name them."""
    both = ("student", tokenizer()), ("teacher", teacher_tokenizer or tokenizer())
    for seed, (name, own) in enumerate(both):
        model(seed, vocab=len(own)).save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    write_rows(folder / "data.jsonl")
    return {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(folder / "data.jsonl"),
    }


def write_rows(path: Path, split: str = "train", count: int = 12) -> None:
    lines = [json.dumps(row) + "\n" for row in translation_rows(split)[:count]]
    path.write_text("".join(lines), encoding="utf-8")


def examples(count: int = 12) -> list[dict[str, Any]]:
    """For a plain Trainer: rows of unequal length, padded; the labels of prompts are masked."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = 6 + i % 5
        ids = torch.randint(2, 999, (12,), generator=random)
        mask = (torch.arange(12) < length).long()
        labels = torch.where((mask == 1) & (torch.arange(12) >= 3), ids, -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def training_arguments(output_dir: Any, **settings: Any) -> TrainingArguments:
    """For a plain Trainer: three steps of SGD."""
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )


def config(output_dir: Any, **settings: Any) -> DuDiConfig:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_completion_length": 8,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "preference_weight": 0.5,
        "on_policy_divergence": "reverse_kl",  # not that of y+: neither passes for the other
    }
    return DuDiConfig(output_dir=str(output_dir), **(defaults | settings))


def logged(folder: Any) -> list[dict[str, Any]]:
    """The logged steps of a run, without the figures that are clock readings."""
    return [
        {name: value for name, value in record.items() if not name.endswith("_per_second")}
        for record in read_jsonl(Path(folder) / "metrics.jsonl")
        if "loss" in record
    ]
