"""`dudi train` and `dudi evaluate` as users meet them: what a run leaves, refuses, survives."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny

from dudi import cli


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return tiny.write_inputs(tmp_path / "inputs")


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(models: dict[str, str], folder: Path, *more: str, **options: Any) -> int:
    settings = {
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
    }
    return cli.main(["train", *words(models | settings | options), *more])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_run_and_its_evaluation(models: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    test = {"dataset_test_name": models["dataset_name"], "eval_generate_rows": 1}
    assert train(models, folder, **test) == 0
    names = {p.name for p in folder.iterdir()}
    assert {"run.json", "metrics.jsonl", "evaluation.json", "report.html", "model"} <= names
    assert json.loads((folder / "evaluation.json").read_text()).keys() == {"before", "after"}
    output = tmp_path / "figures.json"
    options = {
        "model_name_or_path": folder / "model",
        "dataset_name": models["dataset_name"],  # a plain file: all of it, no --split needed
        "teacher_model_name_or_path": models["teacher_model_name_or_path"],
        "generate_rows": 1,
        "output": output,
    }
    assert cli.main(["evaluate", *words(options)]) == 0
    task = json.loads(output.read_text())["tasks"][Path(models["dataset_name"]).name]
    assert task["figures"]["kl_to_teacher"]["mean"]["value"] > 0


def test_an_adapter_can_be_evaluated_and_not_be_a_student(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    adapter = ("--use_peft", "--lora_target_modules", "[q_proj]")
    assert train(models, folder, *adapter) == 0
    options = {"model_name_or_path": folder / "model", "dataset_name": models["dataset_name"]}
    assert cli.main(["evaluate", *words(options), "--generate_rows", "0"]) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    assert train(models | {"model_name_or_path": str(folder / "model")}, other) == 2
    assert "is an adapter, not a model" in error_of(capsys)
    assert not other.exists()


def test_overwriting_keeps_what_is_not_the_run_s(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(models, folder) == 0
    (folder / "notes.txt").write_text("mine")
    inside = models | {"model_name_or_path": str(folder / "model")}
    assert train(inside, folder, "--overwrite") == 2
    assert "--overwrite would remove" in error_of(capsys)
    assert (folder / "model" / "model.safetensors").exists()
    assert train(models, folder, "--overwrite", max_steps=1) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_ctrl_c_during_the_first_evaluation_leaves_nothing(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"

    def press(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("dudi.run.evaluate_model", press)
    test = {"dataset_test_name": models["dataset_name"]}
    assert train(models, folder, **test) == 130
    assert "nothing of the run is left" in error_of(capsys)
    assert not any(folder.iterdir())
    monkeypatch.undo()
    assert train(models, folder, eval_generate_rows=0, **test) == 0


def test_ctrl_c_says_how_to_go_on(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dudi.trainer import DuDiTrainer

    folder = tmp_path / "run"
    real = DuDiTrainer.compute_loss

    def press(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(DuDiTrainer, "compute_loss", press)
    assert train(models, folder, max_steps=3) == 130
    told = error_of(capsys)
    assert "checkpoint-1 is saved" in told and "--resume" in told
    monkeypatch.undo()
    assert train(models, folder, "--resume", max_steps=3) == 0
    assert json.loads((folder / "run.json").read_text())["steps"] == 3


def test_a_run_that_is_not_finite_is_told_in_a_line(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate beyond all bounds: no checkpoint with weights that are not finite."""
    folder = tmp_path / "run"
    options = {"learning_rate": 1e30, "save_steps": 1, "max_grad_norm": 0, "max_steps": 6}
    assert train(models, folder, **options) == 1
    told = error_of(capsys)
    assert "step" in told and "dataset rows [" in told and "Traceback" not in told
    assert not (folder / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": "./no/such/student"}, "model_name_or_path './no/such/student'"),
        ({"model_name_or_path": "runs/student"}, "model_name_or_path 'runs/student' is neither"),
        ({"teacher_model_name_or_path": "/no/teacher"}, "teacher_model_name_or_path '/no/teacher'"),
        ({"tokenizer_name_or_path": "./none"}, "tokenizer_name_or_path './none' does not exist"),
        ({"dataset_name": "./none.jsonl"}, "dataset file or folder './none.jsonl'"),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"report_to": "wandb"}, "report_to"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"num_train_epochs": 0}, "num_train_epochs must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"save_steps": 0}, "save_steps must be"),
        ({"resume_from_checkpoint": "x"}, "pass --resume"),
        ({"metric_for_best_model": "nope"}, "metric_for_best_model must be one of"),
        ({"eval_strategy": "steps"}, "needs a test set"),
        ({"model_init_kwargs": "{dtype: foo}"}, "model_name_or_path"),
        ({"optim": "apollo_adamw"}, "apollo"),
        ({"optim_args": "foo"}, "unpack"),
        ({"memory_budget": 1}, "memory_budget must be at least"),
        ({"verbalizer_templates": "{id: ' '}"}, "neither of them empty"),
    ],
)
def test_bad_input_leaves_nothing(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "run"
    assert train(models, folder, **change) == 2
    assert message in error_of(capsys)
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{model_type: llama, num_hiden_layers: 3}", "did you mean 'num_hidden_layers'?"),
        ("{model_type: llama, hidden_size: abc}", "model_config can't be built"),
        ("{model_type: gpt2, n_positions: 8, n_embd: 32, n_layer: 1, n_head: 2}", "8 positions"),
    ],
)
def test_bad_model_configs(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    message: str,
) -> None:
    folder = tmp_path / "run"
    student = models.pop("model_name_or_path")
    options = {"tokenizer_name_or_path": student, "model_config": settings}
    assert train(models, folder, **options) == 2
    assert message in error_of(capsys)
    assert not folder.exists()


def test_only_a_run_of_ours_is_overwritten(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    for name in ("checkpoint-100", "model"):
        (other / name).mkdir(parents=True)
        (other / name / "mine.txt").write_text("mine")
    assert train(models, other, "--overwrite") == 2
    assert "holds no run" in error_of(capsys)
    folder = tmp_path / "run"
    assert train(models, folder) == 0
    for name in ("checkpoint-best", "notes.tmp"):
        (folder / name).write_text("mine")
    data = folder / "model" / "data.jsonl"
    data.write_text(Path(models["dataset_name"]).read_text())
    assert train(models | {"dataset_name": str(data)}, folder, "--overwrite") == 2
    assert "--overwrite would remove" in error_of(capsys)
    assert train(models, folder, "--overwrite") == 0
    assert (folder / "checkpoint-best").exists() and (folder / "notes.tmp").exists()


def test_a_checkpoint_without_the_optimizer_is_not_resumed(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(models, folder, save_only_model=True) == 0
    with pytest.warns(UserWarning, match="checkpoint-2 is not whole .*no optimizer"):
        assert train(models, folder, "--resume", max_steps=3) == 2
    assert "no whole checkpoint" in error_of(capsys)


def test_bad_rows_are_left_out_if_asked_for(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = tmp_path / "run", Path(models["dataset_name"])
    lines = data.read_text(encoding="utf-8").splitlines()
    blank = [{"role": "assistant", "content": " "}]
    bad = json.dumps({**json.loads(lines[3]), "completion": blank})
    data.write_text("\n".join([*lines[:3], bad, *lines[4:]]), encoding="utf-8")
    assert train(models, folder) == 2
    assert "row 3 of the train dataset: completion must not be empty" in error_of(capsys)
    with pytest.warns(UserWarning, match="1 of 12 rows of the train dataset are bad"):
        assert train(models, folder, bad_rows="skip") == 0
    assert "11 rows, 1 bad rows" in " ".join(capsys.readouterr().out.split())
    told = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    reason = "completion must not be empty, got ' '"
    assert told == [{"split": "train", "row": 3, "reason": reason}]
    with pytest.warns(UserWarning, match="are bad"):
        assert (
            train(models, folder, "--resume", bad_rows="skip", max_steps=3) == 2
        )  # another recipe
    assert "max_steps was 2" in error_of(capsys)


def test_a_launcher_is_told_what_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun reads this file for its summary."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"].partition(": ")[2] in error_of(capsys) + "."


def test_an_adapter_resumes_on_its_own_base_only(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    adapter = ("--use_peft", "--lora_target_modules", "[q_proj]")
    assert train(models, folder, *adapter) == 0
    first = (folder / "metrics.jsonl").read_text()
    other = models | {"model_name_or_path": models["teacher_model_name_or_path"]}
    assert train(other, folder, *adapter, "--resume") == 2
    assert "adapter base model was" in error_of(capsys)
    again = tmp_path / "again"
    assert train(models, again, *adapter) == 0  # the seed draws the adapter too
    steps = [
        [json.loads(line)["loss"] for line in text.splitlines() if '"loss"' in line]
        for text in (first, (again / "metrics.jsonl").read_text())
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("name", ["dudi_config.json", "model.safetensors"])
def test_a_broken_checkpoint_is_told_in_a_line(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Files of the right size with other content."""
    folder = tmp_path / "run"
    assert train(models, folder) == 0
    path = folder / "checkpoint-2" / name
    path.write_bytes(b"{}".ljust(path.stat().st_size))
    assert train(models, folder, "--resume") == 2
    assert name in error_of(capsys)


def test_config_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", "a.yaml", "--config=b.yaml"]) == 2
    assert "--config must be given once" in error_of(capsys)


def test_evaluation_names_its_dataset(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "a"}\n')
    options = {"model_name_or_path": models["model_name_or_path"], "dataset_name": path}
    assert cli.main(["evaluate", *words(options)]) == 2
    assert "row 0: must have prompt and completion, or messages" in error_of(capsys)
