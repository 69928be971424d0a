"""The demo from end to end, cut short: every file it promises, and models that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from dudi import demo
from dudi.callbacks import read_jsonl

FIGURES = {"nll_per_char", "nll_per_token", "kl_to_teacher", "chrf"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on a few rows of every direction."""
    recipe, rows = demo.recipe, demo.translation_rows
    steps = {"max_steps": 2, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    monkeypatch.setattr(demo, "recipe", lambda *names: recipe(*names) | steps)
    monkeypatch.setattr(demo, "translation_rows", lambda split: rows(split)[:36])
    monkeypatch.setattr(demo, "GENERATED_ROWS", 1)


def test_demo(short: None, tmp_path: Path) -> None:
    folder = demo.run_demo(tmp_path / "demo", seed=3, console=Console(quiet=True))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["seed"] == 3
    for name in ("teacher", *demo.RUNS):
        own = summary[name]
        assert {"parameters", "optimizer_steps", "seconds"} < own.keys()
        assert len(own["languages"]) == 10 and own["mean"].keys() == FIGURES
        assert all(figures.keys() == FIGURES for figures in own["languages"].values())
    assert summary["teacher"]["mean"]["kl_to_teacher"] == 0
    assert summary["warm"]["parameters"] * 3 <= summary["teacher"]["parameters"]
    assert {r["run"] for r in read_jsonl(folder / "metrics.jsonl")} == set(demo.RUNS)
    _check_ablations(folder)
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    for checkpoint in ("warm/model", "dudi/model", "dudi/checkpoint-2"):
        AutoModelForCausalLM.from_pretrained(folder / checkpoint)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        demo.run_demo(tmp_path / "other", console=Console(quiet=True), steps=0)
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        demo.run_demo(folder, console=Console(quiet=True))


def _check_ablations(folder: Path) -> None:
    """Each taught run differs from DuDi's own in what it says, at equal steps."""
    runs = {
        name: json.loads((folder / name / "run.json").read_text(encoding="utf-8"))
        for name in demo.RUNS
    }
    assert {run["steps"] for run in runs.values()} == {2}
    own = runs["dudi"]["config"]
    for name, changed in {
        "no_context": {"context_verbalizer"},
        "lexicon": {"lexicon", "lexicon_share"},
    }.items():
        config = runs[name]["config"]
        differ = {key for key in own if own[key] != config.get(key)}
        assert differ - {"output_dir", "logging_dir", "run_name"} == changed
    assert runs["dudi"]["vocabulary"] is None and runs["lexicon"]["vocabulary"] is not None


def test_teacher_is_what_its_card_says() -> None:
    """The embedded teacher fits its limit, and its record names no machine's folders."""
    path = demo.data_path("teacher")
    assert (path / "model.safetensors").stat().st_size <= demo.TEACHER_BYTES
    model = AutoModelForCausalLM.from_pretrained(path)
    record = demo.teacher_info()
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert f"{record['steps']:,} steps" in (path / "README.md").read_text(encoding="utf-8")
    assert "output_dir" not in record["config"]
