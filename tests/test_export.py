"""`dudi export`: what is written is what was saved, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import model, rows, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dudi import cli
from dudi.config import DuDiConfig, ScriptArguments
from dudi.evaluation import Result, TaskResult
from dudi.export import export_model
from dudi.run import run_training
from dudi.saving import DiskError, flaw

GENERATION = '{"do_sample": false,   "temperature": 0.3,\n\n "_odd": true}\n'  # save refuses it


def make_model(folder: Path, dtype: torch.dtype = torch.float32, **shape: Any) -> Path:
    model(width=8, **shape).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(GENERATION)
    return folder


def run_of(folder: Path, **info: Any) -> Path:
    """A run's folder as `dudi train` leaves it, around a model."""
    make_model(folder / "model")
    content = {
        "script": {"model_name_or_path": "org/student", "dataset_name": "/home/me/secret/d.jsonl"},
        "config": {
            "teacher_model_name_or_path": "/home/me/models/teacher",
            "learning_rate": 2e-5,
            "off_policy_divergence": "jsd",
        },
        "environment": {"dudi": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "languages": ["id", "fil"],
        "steps": 120,
        **info,
    }
    (folder / "run.json").write_text(json.dumps(content))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_generation_config_are_untouched(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make_model(tmp_path / "source", dtype)
    out = export_model(str(source), tmp_path / "out")
    before, after = weights(source), weights(out)
    assert before.keys() == after.keys()
    assert all(after[n].dtype == dtype and torch.equal(before[n], after[n]) for n in before)
    assert (out / "generation_config.json").read_bytes() == GENERATION.encode()
    assert flaw(out) is None
    again = AutoTokenizer.from_pretrained(out)
    assert again.chat_template == tokenizer().chat_template
    assert again("Selamat pagi").input_ids == tokenizer()("Selamat pagi").input_ids
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("source", "out")] == []


def test_no_generation_config_is_made_up(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / "generation_config.json").unlink()
    out = export_model(str(source), tmp_path / "out", dtype="bfloat16")
    assert not (out / "generation_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def make_adapter(folder: Path, base: Path) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(str(folder))
    return adapted


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapted = make_adapter(tmp_path / "adapter", base)
    out = export_model(str(tmp_path / "adapter"), tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    found = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    wanted, plain = adapted(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert (found - plain).norm() > 1e-2 * wanted.norm()
    assert not (out / "adapter_config.json").exists()
    assert (out / "generation_config.json").read_bytes() == GENERATION.encode()  # of the base
    assert "LoRA was trained and merged" in (out / "README.md").read_text()


def test_what_is_merged_is_rounded_once(tmp_path: Path) -> None:
    """Into a bf16 base: in fp32, then to bf16."""
    base = make_model(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base)
    out = export_model(str(tmp_path / "adapter"), tmp_path / "out")
    a = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    low, high = (a[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    scale = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] / 2
    wanted = weights(base)[f"{name}.weight"].double() + scale * high @ low
    assert torch.equal(weights(out)[f"{name}.weight"], wanted.float().bfloat16())


# ---- runs and cards ------------------------------------------------------------------------------


def test_the_card_of_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "first")
    figures = {"nll_per_char": 2.25, "chrf": 31.5, "rows": 8.0}
    after = {"languages": {"id": figures, "fil": {"nll_per_char": None}}, "mean": figures}
    before = {"languages": {"id": {"nll_per_char": 3.5}}, "mean": {}}
    (run / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))
    out = export_model(str(run), tmp_path / "out", license="apache-2.0")
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/student")
    assert card.data.language == ["id", "fil"] and card.data.datasets is None
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("nll_per_char", 2.25),
        ("chrf", 31.5),
    }
    for line in (
        "org/student distilled from teacher with DuDi",
        "| languages | Indonesian, Filipino |",
        "| training data | d.jsonl |",
        "| optimizer steps | 120 |",
        "| `off_policy_divergence` | jsd |",
        "| Indonesian | 3.500 | 2.250 |",
    ):
        assert line in card.text
    assert "/home" not in card.content  # a card is published: no paths of whoever trained


def test_the_card_of_evaluated_tasks(tmp_path: Path) -> None:
    """What `dudi evaluate --output` writes: each task is a column, and in the front matter."""
    row = {"row": 0, "language": "th", "group": "0"}
    tasks = {
        "exam": [row | {"questions": 1, "correct": 1}, row | {"questions": 1, "correct": 0}],
        "text": [row | {"nll": 5.0, "chars": 4}],
    }
    result = Result("m", {
        name: TaskResult(name, "", {"sha256": "0"}, rows, resamples=2)
        for name, rows in tasks.items()
    })  # fmt: skip
    file = result.save(tmp_path / "tasks.json")
    source = str(make_model(tmp_path / "source"))
    card = ModelCard.load(
        export_model(source, tmp_path / "out", evaluation=str(file)) / "README.md"
    )
    assert "| Thai | 0.500 | – |" in card.text and "| Thai | – | 1.250 |" in card.text
    assert {(r.dataset_type, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("exam", "accuracy", 0.5),
        ("text", "nll_per_char", 1.25),
    }


def test_a_card_of_a_model_that_nothing_is_known_of(tmp_path: Path) -> None:
    out = export_model(str(make_model(tmp_path / "source")), tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "unknown" and card.data.base_model is None
    assert "It has not been evaluated." in card.text and "## Training" not in card.text


def test_a_run_from_training_to_card(tmp_path: Path) -> None:
    """The final model, and a checkpoint where there is none; as `dudi train` writes them."""
    student = make_model(tmp_path / "student")
    (student / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.3}')
    script = ScriptArguments(model_name_or_path=str(tmp_path / "student"), dataset_name="org/data")
    config = DuDiConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, ce_weight=1.0,
        off_policy_weight=0.0, on_policy_weight=0.0, preference_weight=0.0, use_cpu=True,
        per_device_train_batch_size=2, report_to="none", max_completion_length=8,
        learning_rate=1e-2,
    )  # fmt: skip
    run = run_training(script, config, train=rows(8))
    final = export_model(str(run), tmp_path / "final")
    assert all(torch.equal(w, weights(run / "model")[n]) for n, w in weights(final).items())
    kept = (final / "generation_config.json").read_bytes()
    assert kept == (run / "model" / "generation_config.json").read_bytes()
    assert json.loads(kept)["temperature"] == 0.3
    assert "org/data" in ModelCard.load(final / "README.md").data.datasets
    first = export_model(str(run / "checkpoint-1"), tmp_path / "first")
    assert not all(torch.equal(w, weights(final)[n]) for n, w in weights(first).items())
    (run / "checkpoint-1" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 is not whole: scheduler\.pt is not there"):
        export_model(str(run / "checkpoint-1"), tmp_path / "again")


# ---- refused -------------------------------------------------------------------------------------


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "bad.json").write_text('{"model": {"mean": {}}}')
    for options, message in (
        ({"dtype": "fp8"}, "dtype must be one of float32, bfloat16, float16, got 'fp8'"),
        ({"output_dir": tmp_path / "full"}, "is not empty: pass --overwrite"),
        ({"output_dir": tmp_path / "full", "overwrite": True}, "is not an export of ours"),
        ({"output_dir": tmp_path / "bad.json"}, "is a file"),
        ({"model_name_or_path": str(tmp_path / "gone")}, "does not exist"),
        ({"evaluation": str(tmp_path / "bad.json")}, "must be an object with languages"),
        ({"evaluation": str(tmp_path / "none.json")}, "can't be read"),
    ):
        given: dict[str, Any] = {
            "model_name_or_path": str(source),
            "output_dir": tmp_path / "out",
            **options,
        }
        with pytest.raises(ValueError, match=message):
            export_model(**given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "full", "source"]


def test_what_is_not_finite_or_lacks_its_base_is_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    broken = weights(source)
    broken["model.norm.weight"][0] = float("nan")
    save_file(broken, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not finite: not exported"):
        export_model(str(source), tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="must name its base in base_model_name_or_path, got None"):
        export_model(str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_can_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model(tmp_path / "source")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dudi.export.write_card", full)  # the last file but the manifest
    with pytest.raises(DiskError, match=r"out could not be written: .*No space left"):
        export_model(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    out = export_model(str(source), tmp_path / "out")
    with pytest.raises(ValueError, match="holds the model to be exported"):
        export_model(str(out), out, overwrite=True)
    words = ["--model_name_or_path", str(source), "--output_dir", str(out), "--dtype=float16"]
    assert cli.main(["export", *words, "--overwrite"]) == 0
    assert weights(out)["model.norm.weight"].dtype == torch.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
