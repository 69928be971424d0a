"""A teacher with another tokenizer or head: a run, its evaluation, its map, rows without pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from test_run import error_of, train, words
from test_teaching import GIVEN, make, normalizing, step, teacher_tokenizer

from dudi import cli
from dudi.bridge import MapSettings, build_bridge
from dudi.callbacks import read_jsonl
from dudi.rows import Reader, TeacherPrompts
from dudi.trainer import DuDiTrainer


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """With a teacher that has a tokenizer of its own."""
    made = tiny.write_inputs(tmp_path / "inputs", teacher_tokenizer())
    return made | {"preference_weight": "0.1", "verbalizer_cache_dir": "null"}


def losses(folder: Path) -> list[dict[str, Any]]:
    return tiny.logged(folder)


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_its_evaluation_and_its_report(models: dict[str, str], tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "figures.json"
    settings = {
        "dataset_test_name": models["dataset_name"],
        "eval_generate_rows": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "confidence_gating": 1.0,
        "verbalized_share": 0.5,
        "teacher_skip_tokens": 1,
    }
    assert train(models, run, **settings) == 0
    for line in losses(run):
        assert 0 < line["taught_rows"] < 1 and 0 < line["paired_rows"] < 1
        assert 0 < line["confidence_gate"] <= 1 and line["verbalizer_shift"] > 0
    held_out = [line for line in read_jsonl(run / "metrics.jsonl") if "eval_loss" in line]
    assert len(held_out) == 2 and all(line["eval_kl_to_teacher"] > 0 for line in held_out)
    info = json.loads((run / "run.json").read_text())
    assert info["vocabulary"]["same tokenizer"] is False
    assert "Verbalizer(" in (run / "report.html").read_text()
    options = {
        "model_name_or_path": run / "model",
        "dataset_name": models["dataset_name"],
        "teacher_model_name_or_path": models["teacher_model_name_or_path"],
        "max_completion_length": 6,
        "generate_rows": 0,
        "output": output,
    }
    before = json.loads((run / "evaluation.json").read_text())["after"]["mean"]["kl_to_teacher"]
    for more in ({}, {"vocabulary_verbalizer": run / "verbalizer.safetensors"}):
        assert cli.main(["evaluate", *words(options | more)]) == 0
        (task,) = json.loads(output.read_text())["tasks"].values()
        own = task["figures"]["kl_to_teacher"]
        kl = own.get("mean", next(iter(own.values())))["value"]
        assert kl == pytest.approx(before, rel=1e-5)
    assert cli.main(["report", str(run)]) == 0


def test_resuming_continues_the_curve_exactly(models: dict[str, str], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "confidence_gating": 0.5}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(models, whole, **saving) == 0
    assert train(models, cut, **saving) == 0
    (cut / "checkpoint-2").rename(tmp_path / "aside")
    assert train(models, cut, "--resume", **saving) == 0
    assert losses(cut) == losses(whole)
    weights = [torch.load(p / "checkpoint-2" / "optimizer.pt") for p in (whole, cut)]
    for one, other in zip(*(w["state"].values() for w in weights), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])


def test_a_run_with_the_map_of_another_run(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert train(models, first) == 0
    saved = {"vocabulary_verbalizer": str(first / "verbalizer.safetensors")}
    assert train(models | saved, again) == 0
    assert losses(first) == losses(again)
    teacher = teacher_tokenizer()
    teacher.add_tokens(["something new"])
    teacher.save_pretrained(models["teacher_model_name_or_path"])
    tiny.model(7, vocab=len(teacher)).save_pretrained(models["teacher_model_name_or_path"])
    capsys.readouterr()
    assert train(models | saved, tmp_path / "changed") == 2
    assert "teacher_tokenizer must be the one that" in error_of(capsys)
    assert not (tmp_path / "changed").exists()


def test_a_reference_of_other_tokens_is_refused(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(models, tmp_path / "run", reference="teacher") == 2
    assert "reference must not be 'teacher'" in error_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_padded_heads(models: dict[str, str], wider: str, tmp_path: Path) -> None:
    """One tokenizer; the head of one model has rows that no token has."""
    for name in ("student", "teacher"):
        folder = models[f"{'' if name == 'student' else 'teacher_'}model_name_or_path"]
        model = tiny.model(len(name))
        if name == wider:
            model.resize_token_embeddings(tiny.VOCAB + 64, mean_resizing=False)
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    first, again = tmp_path / "first", tmp_path / "again"
    assert train(models, first) == 0
    saved = {"vocabulary_verbalizer": str(first / "verbalizer.safetensors")}
    assert train(models | saved, again) == 0
    assert losses(first) == losses(again)


# ---- which tokenizer a teacher has ---------------------------------------------------------------


def test_a_teacher_s_tokenizer_lies_beside_it_or_is_the_student_s(tmp_path: Path) -> None:
    student, own, folder = tiny.model(0), tiny.tokenizer(), tmp_path / "teacher"
    tiny.model(1).save_pretrained(folder)
    teacher = type(student).from_pretrained(folder)
    assert build_bridge(student, teacher, own, None, MapSettings()).tokenizer is own
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the teacher's tokenizer .* can't be loaded"):
        build_bridge(student, teacher, own, None, MapSettings())


def test_a_prompt_must_give_the_teacher_a_token() -> None:
    """The student may have a beginning-of-sequence token where the teacher has none."""
    prompts = TeacherPrompts(Reader(teacher_tokenizer()))
    with pytest.raises(ValueError, match="prompt must give at least one token of the teacher's"):
        prompts.plain({"prompt": "", "completion": "x"})


# ---- rows that don't pair ------------------------------------------------------------------------


def without_partners(folder: Path, count: int, **settings: Any) -> DuDiTrainer:
    """The first `count` of 8 responses are ones that the teacher's tokenizer changes."""
    texts = ["cafe\u0301 noi\u0302"] * count + ["a cafe"] * (8 - count)
    teacher = normalizing()
    return DuDiTrainer(
        tiny.model(0),
        tiny.model(1, vocab=len(teacher)),
        args=tiny.config(folder, **(GIVEN | {"max_unpaired": 1.0} | settings)),
        train_dataset=Dataset.from_list([{"prompt": "p", "completion": text} for text in texts]),
        processing_class=tiny.tokenizer(),
        teacher_processing_class=teacher,
    )


@pytest.mark.filterwarnings("ignore:the teacher's tokenizer changes the bytes")
def test_a_micro_batch_without_a_pair_teaches_nothing(tmp_path: Path) -> None:
    trainer = without_partners(tmp_path, 8, ce_weight=1.0)
    batch, output = step(trainer)
    assert not len(batch.lesson.student_rows) and output.off_policy_loss == 0
    assert output.loss.item() == pytest.approx(output.ce_loss.item())
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())
    assert without_partners(tmp_path, 8, ce_weight=1.0, max_steps=1).train().training_loss > 0


@pytest.mark.filterwarnings("ignore:the teacher's tokenizer changes the bytes")
def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Means are over all rows of y+ for cross-entropy, over those that pair for the divergence,
    in whichever micro-batches they are."""
    logs = []
    for size in (8, 2):
        trainer = without_partners(
            tmp_path / str(size),
            5,
            ce_weight=0.5,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            train_sampling_strategy="sequential",
            unmatched="renormalize",
            optim="sgd",  # Adam makes much of the rounding of a gradient that is almost 0
            learning_rate=1.0,
            warmup_steps=0,
        )
        trainer.train()
        (line,) = losses(tmp_path / str(size))
        grown = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        logs.append((line, grown))
    (whole, one), (parts, other) = logs
    names = ("loss", "off_policy_loss", "ce_loss", "grad_norm", "paired_rows", "teacher_entropy")
    assert [parts[n] for n in names] == pytest.approx([whole[n] for n in names], rel=1e-5)
    assert 0 < whole["paired_rows"] < 1
    assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_cross_entropy_beside_a_divergence_of_fewer_rows(tmp_path: Path) -> None:
    """Leaving rows of the divergence out leaves cross-entropy alone."""
    every, fewer = (
        step(make(tmp_path, **GIVEN, ce_weight=0.5, teacher_skip_tokens=k))[1] for k in (0, 3)
    )
    assert fewer.ce_loss.item() == pytest.approx(every.ce_loss.item(), rel=1e-6)
    assert fewer.off_policy_loss.item() != pytest.approx(every.off_policy_loss.item(), rel=1e-3)
    want = fewer.off_policy_loss + 0.5 * fewer.ce_loss
    assert fewer.loss.item() == pytest.approx(want.item(), rel=1e-6)
