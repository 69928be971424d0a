"""`dudi plan`: the peak as measured, FLOPs as counted by hand, what it refuses and advises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from dudi import cli
from dudi.demo_data import data_path
from dudi.planning import RunPlan, plan_run, read_options
from dudi.planning.advice import Recipe, advise, make_fit

HERE = Path(__file__).parent
VOCAB = 16_384  # of the demo's tokenizer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
QWEN = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
COMMON: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_prompt_length": 224,
    "max_completion_length": 32,
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
    return plan_run(*read_options(options), **settings)


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
        "model_config": LLAMA | {"vocab_size": 49_152},
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_what_is_measured(name: str, tmp_path: Path) -> None:
    settings = options(tmp_path, **CASES[name])
    if settings.get("on_policy_weight", 1) > 0:
        settings["teacher_model_name_or_path"] = teacher(tmp_path / "teacher")
    plan, peak = planned(settings), measured(settings)
    print(f"{name}: planned {plan.peak.bytes / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
    assert abs(plan.peak.bytes / peak - 1) <= 0.15


# ---- against figures by hand ---------------------------------------------------------------------

LAYERS = 2
SMALL = LLAMA | {"num_hidden_layers": LAYERS}
BLOCK = 4 * 384**2 + 3 * 384 * 1024  # weights of the GEMMs of a layer
TRAINED = VOCAB * 384 + LAYERS * (BLOCK + 2 * 384) + 384
SFT: dict[str, Any] = {
    "off_policy_weight": 0,
    "on_policy_weight": 0,
    "preference_weight": 0,
    "ce_weight": 1,
    "model_config": SMALL,
}


def config_folder(folder: Path, **settings: Any) -> str:
    """A model's configuration and nothing else."""
    AutoConfig.for_model(**(SMALL | settings)).save_pretrained(folder)
    return str(folder)


def taught(folder: Path, **settings: Any) -> dict[str, Any]:
    """All signals, of models without weights."""
    student, other = (config_folder(folder / n) for n in ("student", "teacher"))
    models = {"model_name_or_path": student, "teacher_model_name_or_path": other}
    return options(folder, **(models | settings))


def test_flops_are_those_counted_by_hand(tmp_path: Path) -> None:
    plan = planned(taught(tmp_path, gradient_accumulation_steps=3))
    tokens, layers, heads, width = 8 * 256, LAYERS, 6, 64
    gemms, scores = 2 * tokens * layers * BLOCK, layers * heads * 8 * 256**2 * width
    head = 2 * 8 * 32 * VOCAB * 384  # rows x vocabulary x width
    longer = 2 * 8 * 288 * layers * BLOCK + 4 * layers * heads * 8 * 288**2 * width
    assert plan.flops["student forward"] == 3 * (gemms + 4 * scores)
    assert plan.flops["student backward"] == 3 * (2 * gemms + 10 * scores)
    assert plan.flops["teacher forward"] == 3 * longer
    assert plan.flops["reference forward"] == 3 * (gemms + 4 * scores + head)
    assert plan.flops["fused loss"] == 3 * 4 * head
    contexts = sum(range(225, 256))  # of the steps of decoding, after a prefill of 224
    prefill = 2 * 4 * 224 * layers * BLOCK + 4 * layers * heads * 4 * 224**2 * width
    steps = 2 * 4 * 31 * layers * BLOCK + 4 * layers * heads * 4 * contexts * width
    logits = 2 * 4 * 32 * VOCAB * 384
    assert plan.flops["sampling"] == pytest.approx(3 * (prefill + steps + logits), rel=1e-6)


def test_checkpointing_runs_the_layers_again(tmp_path: Path) -> None:
    plain, again = (
        planned(options(tmp_path, **SFT, activation_checkpointing=on)) for on in (False, True)
    )
    forward = plain.flops["student forward"]
    assert again.flops["student forward"] == forward
    more = again.flops["student backward"] - plain.flops["student backward"]
    last = 2 * 4 * 256 * LAYERS * 384 * 1024  # of each layer's GEMMs: nothing needs its result
    assert more == forward - last
    assert again.peak.bytes < plain.peak.bytes


def test_what_stays_in_memory(tmp_path: Path) -> None:
    plan = planned(taught(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"}))
    for phase in plan.phases:
        assert phase.parts["student weights"] == pytest.approx(4 * TRAINED, rel=1e-4)  # and buffers
        assert phase.parts["teacher weights"] == pytest.approx(2 * TRAINED, rel=1e-4)
        assert phase.parts["optimizer states"] == pytest.approx(8 * TRAINED, rel=1e-4)
        assert phase.parts["reference copy"] == 4 * TRAINED
    assert plan.phases[-1].parts["gradients"] == 4 * TRAINED
    assert "gradients" not in plan.phases[0].parts  # of sampling
    assert plan.parameters == {"student": TRAINED, "trained": TRAINED, "teacher": TRAINED}


def test_the_cache_of_rollouts(tmp_path: Path) -> None:
    """Longer responses add keys and values of each layer."""
    both = [planned(taught(tmp_path, max_completion_length=n)).phases[0] for n in (300, 600)]
    assert [phase.name for phase in both] == ["sampling"] * 2
    more = (
        both[1].parts["rollouts (KV cache, logits)"] - both[0].parts["rollouts (KV cache, logits)"]
    )
    token = 4 * 2 * 384 * 4  # prompts x keys and values x width x fp32
    assert (
        LAYERS * 300 * token <= more <= (LAYERS + 2) * 300 * token
    )  # a layer's is copied as it grows


def test_several_samples_of_a_prompt(tmp_path: Path) -> None:
    """More sequences everywhere; drawn a few at a time they take as many FLOPs and less memory."""
    one, three, few = (
        planned(taught(tmp_path, **settings))
        for settings in (
            {}, {"num_generations": 3}, {"num_generations": 3, "rollout_batch_size": 4},
        )
    )  # fmt: skip
    assert (one.load.sides, three.load.sides, three.load.taught) == (2, 4, 4)
    assert three.flops["sampling"] == pytest.approx(3 * one.flops["sampling"], rel=1e-2)
    assert few.flops["sampling"] == pytest.approx(three.flops["sampling"], rel=1e-2)
    assert few.phases[0].bytes < three.phases[0].bytes
    assert three.flops["student forward"] == pytest.approx(2 * one.flops["student forward"])


def test_what_a_reference_takes(tmp_path: Path) -> None:
    kept = {"reference_dtype": "bfloat16"}, {"reference_on_cpu": True}
    half, moved = (planned(taught(tmp_path, **own)).phases[-1].parts for own in kept)
    assert half["reference copy"] == 2 * TRAINED and "reference copy" not in moved
    adapter = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"]}
    assert "reference copy" not in planned(taught(tmp_path, **adapter)).phases[-1].parts


def test_an_adapter_has_states_of_its_own_only(tmp_path: Path) -> None:
    adapter = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"]}
    plan = planned(options(tmp_path, **SFT, **adapter))
    trained = LAYERS * 8 * (384 + 384)
    assert plan.parameters["trained"] == trained
    assert plan.peak.parts["optimizer states"] == pytest.approx(8 * trained, rel=1e-2)


def test_several_gpus(tmp_path: Path) -> None:
    settings = options(tmp_path, **SFT)
    one, ddp, fsdp = (
        planned(settings | more, gpus=gpus).phases[-1].parts
        for gpus, more in ((1, {}), (2, {}), (2, {"fsdp_size": "auto"}))
    )
    groups = planned(settings | {"fsdp_size": 2}, gpus=4).phases[-1].parts
    assert groups == fsdp
    assert ddp == one | {"DDP buckets": 4 * TRAINED}
    assert fsdp["optimizer states"] == -(-one["optimizer states"] // 2)
    gathered = 4 * (TRAINED - LAYERS * (BLOCK + 768)) + 3 * 4 * (BLOCK + 768)
    assert fsdp["gathered weights and gradients"] == gathered


# ---- what to change ------------------------------------------------------------------------------


def test_advice_is_what_a_new_plan_says(tmp_path: Path) -> None:
    settings = taught(tmp_path, max_teacher_prompt_length=224, use_cpu=False)
    plan = planned(settings, gpu_memory=0.25)
    assert plan.fits is False
    recipe = Recipe(*read_options(settings))
    alone = list(advise(recipe, plan))
    names = [line.partition(":")[0] for one in alone for line in one.change]
    assert {"activation_checkpointing", "gradient_accumulation_steps", "use_peft"} < set(names)
    assert {"teacher_model_init_kwargs", "max_completion_length", "reference"} < set(names)
    for one in alone:
        changed = settings | yaml.safe_load("\n".join(one.change))
        again = planned(changed, gpu_memory=0.25)
        assert again.peak == one.plan.peak
        assert one.saved == plan.peak.bytes - again.peak.bytes > 0


def test_changes_one_upon_another(tmp_path: Path) -> None:
    settings = taught(tmp_path, max_teacher_prompt_length=224, use_cpu=False)
    recipe = Recipe(*read_options(settings))
    plan = planned(settings, gpu_memory=0.25)
    together = make_fit(recipe, plan)
    assert len(together) > 1 and together[-1].plan.fits
    assert not any(one.plan.fits for one in together[:-1])
    assert sum(one.saved for one in together) == plan.peak.bytes - together[-1].plan.peak.bytes
    changes = (yaml.safe_load("\n".join(one.change)) for one in together)
    changed = reduce(or_, changes, settings)
    assert planned(changed, gpu_memory=0.25).peak == together[-1].plan.peak
    assert make_fit(recipe, planned(settings, gpu_memory=40)) == []


# ---- the command, and what it refuses ------------------------------------------------------------


def run(folder: Path, settings: dict[str, Any], *words: str) -> int:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return cli.main(["plan", "--config", str(recipe), *words])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = taught(tmp_path, use_cpu=False)
    del settings["dataset_name"], settings["output_dir"]
    file = tmp_path / "plans" / "plan.json"
    words = ("--gpus", "2", "--gpu_memory", "0.3", "--json", str(file))
    assert run(tmp_path, settings, *words) == 0
    shown = capsys.readouterr().out
    for text in (
        "DDP buckets",
        "does not fit",
        "activation_checkpointing: true",
        "fsdp_size: auto",
        "One upon",
    ):
        assert text in shown
    told = json.loads(file.read_text())
    assert told["gpus"] == 2 and told["fits"] is False and told["changes"][0]["saved_bytes"] > 0
    assert told["peak_bytes"] == max(phase["bytes"] for phase in told["phases"].values())
    assert told["flops"]["total"] == sum(told["flops"].values()) - told["flops"]["total"]
    assert run(tmp_path, settings, "--gpus=2", "--gpu_memory=40", "--fsdp_size", "auto") == 0
    assert "Shards over 2 ranks are an estimate" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["plan", "--help"]) == 0
    assert "--gpu_memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({}, ("--gpus", "0"), "gpus must be at least 1, got 0"),
        ({}, ("--gpu_memory", "-3"), "gpu_memory must be positive, in GiB, got -3"),
        ({"fsdp_size": 3}, ("--gpus", "4"), "fsdp_size must divide gpus, 4, got 3"),
        ({}, ("--prompt_length", "999"), "prompt_length must be from 1 to max_prompt_length=224"),
        ({}, ("--teacher_prompt_length", "9"), "the teacher reads no prompt of its own"),
        ({"max_prompt_length": None}, (), "prompt_length must be given: the recipe has no max_"),
        ({"model_config": None, "model_name_or_path": "./none"}, (), "'./none' does not exist"),
        (
            {"model_config": None, "model_name_or_path": "a/b"},
            (),
            "neither a folder here nor a Hub",
        ),
        ({"on_policy_weight": 1}, (), "teacher_model_name_or_path must be given"),
        ({"on_policy_weight": 1, "teacher_cache": "c"}, (), "teacher_cache must be left out"),
        ({"off_policy_weight": 1, "teacher_url": "u"}, (), "teacher_url must be left out"),
        ({"optim": "adamw_bnb_8bit"}, (), "optim 'adamw_bnb_8bit' can't be planned"),
        ({"model_init_kwargs": {"load_in_4bit": True}}, (), "must not have load_in_4bit"),
        (
            {"teacher_model_init_kwargs": {"dtype": "float31"}, "on_policy_weight": 1},
            ("--teacher_model_name_or_path", str(data_path("teacher"))),
            "dtype of teacher_model_name_or_path must be one of torch, or auto, got 'float31'",
        ),
        ({"memory_budget": 1000}, (), "memory_budget must be at least"),
        (
            {"model_config": {"model_type": "gpt2", "n_positions": 100, "vocab_size": VOCAB}},
            (),
            "has 100 positions, sequences have up to 256",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    settings: dict[str, Any],
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "plan.json"
    assert run(tmp_path, options(tmp_path, **(SFT | settings)), *words, "--json", str(file)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("error: ") and message in told
    assert not file.exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(tmp_path: Path, bits: int) -> None:
    """A body in its bytes, teacher's or student's; an adapter is all that has gradients."""
    small = {"quantization_config": {f"load_in_{bits}bit": True}}
    whole, taught_by = (
        planned(taught(tmp_path, teacher_model_init_kwargs=kwargs)) for kwargs in (None, small)
    )
    scales = LAYERS * (BLOCK // 64 if bits == 4 else 5 * 384 + 2 * 1024) * 4  # fp32
    before, after = (plan.peak.parts["teacher weights"] for plan in (whole, taught_by))
    assert before - after == LAYERS * BLOCK * 4 - LAYERS * BLOCK * bits // 8 - scales
    assert whole.parameters == taught_by.parameters
    qlora = taught(tmp_path, model_init_kwargs=small, use_peft=True)
    plan, unquantized = planned(qlora), planned(qlora | {"model_init_kwargs": None})
    assert plan.parameters == unquantized.parameters
    assert plan.peak.bytes < unquantized.peak.bytes
    with pytest.raises(ValueError, match="can't be trained but through an adapter"):
        planned(qlora | {"use_peft": False})
    odd = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ValueError, match="load_in_8bit and load_in_4bit alone"):
        planned(taught(tmp_path, teacher_model_init_kwargs=odd))


def test_sampling_with_rounded_weights(tmp_path: Path) -> None:
    """A static cache takes no two types: under autocast the weights are rounded meanwhile."""
    peaks = [
        next(p for p in planned(taught(tmp_path, bf16=True, rollout_cache=c)).phases
             if p.name == "sampling").bytes
        for c in ("dynamic", "static")
    ]  # fmt: skip
    assert peaks[1] - peaks[0] == 2 * TRAINED
