"""Teachers in 8 and 4 bits, and QLoRA: a student whose adapter alone is trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_trainer import lora

from dudi.evaluation.command import run_evaluation
from dudi.quantization import is_quantized, read_quantization
from dudi.reference import AdapterOff
from dudi.trainer import DuDiTrainer

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each 8-bit product
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (dudi[quantization])")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KINDS: dict[str, dict[str, Any]] = {"8 bits": {"load_in_8bit": True}, "4 bits": NF4}
ERRORS = {"8 bits": 0.05, "4 bits": 0.3}  # of a random model's losses, relative


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student and a teacher with wide layers, with their tokenizer."""
    made = {}
    for seed, who in enumerate(("student", "teacher")):
        folder = tmp_path_factory.mktemp(who)
        tiny.model(seed, width=64, layers=2, tied=who == "student").save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        made[who] = str(folder)
    return made


def make(folder: Path, folders: dict[str, str], adapter: Any = None, **settings: Any) -> Any:
    return DuDiTrainer(
        folders["student"],
        folders["teacher"],
        args=tiny.config(folder, **settings),
        train_dataset=tiny.rows(),
        peft_config=adapter,
    )


def quantized(kind: str) -> dict[str, Any]:
    return {"quantization_config": KINDS[kind], "dtype": "float32"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_teacher(tmp_path: Path, folders: dict[str, str], kind: str) -> None:
    """Losses near those of the whole one, the same in each run; its body is not trained."""
    settings = {"max_steps": 2, "reference": "teacher"}
    make(tmp_path / "whole", folders, **settings).train()
    for name in ("once", "again"):
        trainer = make(
            tmp_path / name, folders, teacher_model_init_kwargs=quantized(kind), **settings
        )
        trainer.train()
    layer = trainer.teacher.model.layers[0].self_attn.q_proj.weight
    assert layer.dtype in (torch.int8, torch.uint8)
    assert type(trainer.teacher.lm_head.weight.data) is torch.Tensor
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.parameters())
    once, again, whole = (tiny.logged(tmp_path / n) for n in ("once", "again", "whole"))
    assert once == again
    for key in ("off_policy_loss", "on_policy_loss", "grad_norm"):
        got = once[0][key]
        assert got == pytest.approx(whole[0][key], rel=ERRORS[kind]) and got != whole[0][key]


@pytest.mark.parametrize("kind", KINDS)
def test_qlora_trains_resumes_and_is_evaluated(
    tmp_path: Path, folders: dict[str, str], kind: str
) -> None:
    """Bit for bit on a CPU, with checkpointing of activations or without; the frozen weights stay
    as they are; the adapter's folder is a model to evaluate, and to merge."""
    settings: dict[str, Any] = {
        "model_init_kwargs": quantized(kind), "save_strategy": "steps", "save_steps": 1,
        "max_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    whole = make(tmp_path / "whole", folders, lora(), **settings)
    assert isinstance(whole.reference, AdapterOff)
    frozen = {n: p.detach().clone() for n, p in whole.model.named_parameters() if "lora" not in n}
    whole.train()
    for name, value in whole.model.named_parameters():
        assert ("lora" in name) == value.requires_grad
        assert "lora" in name or torch.equal(value, frozen[name])
    again = make(tmp_path / "again", folders, lora(), **settings)
    again.train(str(tmp_path / "whole" / "checkpoint-1"))
    make(
        tmp_path / "made twice", folders, lora(), activation_checkpointing=True, **settings
    ).train()
    runs = {name: tiny.logged(tmp_path / name) for name in ("whole", "again", "made twice")}
    assert runs["again"] == runs["whole"][1:] and runs["made twice"] == runs["whole"]
    assert runs["whole"][1]["rewards/margins"] != 0
    saved = [tmp_path / n / "checkpoint-2" for n in ("whole", "again")]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in saved)
    assert all(torch.equal(one[name], two[name]) for name in one) and len(one) == 8
    again.check_resumable()

    evaluates_and_merges(tmp_path, folders["student"], saved[0])


def evaluates_and_merges(folder: Path, student: str, adapter: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tiny.tokenizer().save_pretrained(folder / "merged")

    def nll(name: str | Path) -> float:
        result = run_evaluation(str(name), dataset_name=str(rows), generate_rows=0)
        (task,) = result.tasks.values()
        return task.value("nll_per_token")

    before, after, same = nll(student), nll(adapter), nll(folder / "merged")
    assert after < before and same == pytest.approx(after, rel=1e-5)


def test_what_is_wrong_is_named(tmp_path: Path, folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"the student is quantized.*set use_peft"):
        make(tmp_path, folders, model_init_kwargs=quantized("4 bits"))
    skipping = {"quantization_config": NF4 | {"llm_int8_skip_modules": ["embed_tokens"]}}
    with pytest.raises(TypeError, match="the head of LlamaForCausalLM must not be quantized"):
        make(tmp_path, folders, teacher_model_init_kwargs=skipping)
    for given, message in (
        ({"load_in_4bits": True}, "must have load_in_8bit or load_in_4bit, or a quant_method of"),
        ({"load_in_4bit": True, "bnb_4bit_quant": "nf4"}, "has no 'bnb_4bit_quant'; did you mean"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf"}, "can't be used"),
    ):
        with pytest.raises(ValueError, match=f"quantization_config of teacher {message}"):
            read_quantization(given, "teacher")
    assert not is_quantized(tiny.model(0))
