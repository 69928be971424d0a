"""`dudi plan`: the peak as measured, FLOPs as counted by hand, what it refuses and advises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from dudi.config import from_options
from dudi.demo_data import data_path
from dudi.planning import Lengths, RunPlan, plan_run

HERE = Path(__file__).parent
VOCAB = 16_384  # of the demo's tokenizer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
QWEN = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "num_hidden_layers": 4}
COMMON: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_prompt_length": 192,
    "max_completion_length": 64,
    "max_teacher_prompt_length": 256,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "memory_budget": 50_000_000,
    "tokenizer_name_or_path": str(data_path("tokenizer")),
}


def teacher(folder: Path, **settings: Any) -> str:
    """A teacher on disk, in bf16."""
    config = AutoConfig.for_model(**(LLAMA | {"pad_token_id": 0, "eos_token_id": 1} | settings))
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return str(folder)


def data(folder: Path) -> str:
    """Rows at the limits but for one in four, so that batches are padded."""
    rows = []
    for i in range(8):
        text = "Wi-Fi " * (40 if i % 4 == 0 else 400)
        row = {"prompt": text, "completion": text, "language": "id", "pivot_prompt": text}
        rows.append(json.dumps(row))
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def options(folder: Path, **settings: Any) -> dict[str, Any]:
    return COMMON | {"dataset_name": data(folder), "output_dir": str(folder / "run")} | settings


def planned(options: dict[str, Any], **settings: Any) -> RunPlan:
    return plan_run(*from_options(options), **settings)


def measured(options: dict[str, Any]) -> int:
    limits = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = os.environ | limits | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "plan_once.py"), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


CASES: dict[str, dict[str, Any]] = {
    "three signals": {"model_config": LLAMA},
    "checkpointing, a large head": {
        "model_config": LLAMA | {"vocab_size": 65_536, "num_hidden_layers": 8},
        "activation_checkpointing": True,
        "off_policy_weight": 0,
        "on_policy_weight": 0,
        "preference_weight": 0,
        "ce_weight": 1,
    },
    "LoRA, accumulation": {
        "model_config": QWEN,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "gradient_accumulation_steps": 2,
        "reference": "teacher",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_what_is_measured(name: str, tmp_path: Path) -> None:
    settings = options(tmp_path, **CASES[name])
    if settings.get("on_policy_weight", 1) > 0:
        settings["teacher_model_name_or_path"] = teacher(tmp_path / "teacher")
    plan, peak = planned(settings), measured(settings)
    print(name, plan.peak.bytes / 1e6, peak / 1e6, plan.peak.bytes / peak)
    for phase in plan.phases:
        print(phase.name, phase.bytes / 1e6, {k: round(v / 1e6, 1) for k, v in phase.parts.items()})
    assert abs(plan.peak.bytes / peak - 1) <= 0.15
