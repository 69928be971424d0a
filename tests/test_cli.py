"""The `dudi` command: dispatch, help, errors in one line, and the recipes that ship with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dudi import __version__, cli
from dudi.config import DuDiConfig, ScriptArguments, field_types, parse
from dudi.finite import NonFiniteLossError

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(p for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("ablation"))
FIXED = {"remove_unused_columns", "logging_nan_inf_filter"}  # options with one legal value


def record(monkeypatch: pytest.MonkeyPatch, target: str, result: Any = None) -> list[Any]:
    """Replace `target` and return the list of (positional, keyword) arguments it is called with."""
    calls: list[Any] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("console", None)
        calls.append((args, kwargs))
        return result

    monkeypatch.setattr(target, stand_in)
    return calls


def test_light_commands_import_nothing_heavy() -> None:
    code = (
        "import sys; from dudi.cli import main; main(['--help']); main(['--version']); "
        "main(['demo', '--help']); print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "Usage: dudi COMMAND [--name value ...]" in lines
    assert f"dudi {__version__}" in lines
    assert lines[-1] == "[]"


def test_train_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    grouped = [name for names in cli.TRAIN_GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    own = set(DuDiConfig.__annotations__) | set(field_types(ScriptArguments))
    assert own - FIXED <= set(grouped)
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in grouped)
    assert "transformers.TrainingArguments" in shown


def test_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = record(monkeypatch, "dudi.run.run_training")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: student\ndataset_name: d.jsonl\nreport_to: none\n")
    words = ["train", "--output-dir", str(tmp_path / "a b"), "--config", str(recipe), "--beta=0.3"]
    assert cli.main(words) == 0
    (((script, config), kwargs),) = calls
    assert script.model_name_or_path == "student"
    assert (config.beta, config.output_dir) == (0.3, str(tmp_path / "a b"))
    assert kwargs["command"].endswith(f"--output-dir '{tmp_path}/a b' --config {recipe} --beta=0.3")


def test_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, "dudi.evaluation.command.run_evaluation")
    words = ["--model-name-or-path", "m", "--dataset_name=d.jsonl", "--generate_rows", "8"]
    assert cli.main(["evaluate", *words, "--tasks", "udhr, a.yaml", "--languages=[th]"]) == 0
    ((_, kwargs),) = calls
    assert (kwargs["tasks"], kwargs["languages"]) == (["udhr", "a.yaml"], ["th"])
    assert (kwargs["model_name_or_path"], kwargs["generate_rows"], kwargs["split"]) == (
        "m",
        8,
        None,
    )


def test_compare_takes_runs_before_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, "dudi.evaluation.command.run_comparison")
    assert cli.main(["compare", "runs/a", "b c.json", "--baseline", "a"]) == 0
    ((_, kwargs),) = calls
    assert (kwargs["runs"], kwargs["baseline"]) == (["runs/a", "b c.json"], "a")


@pytest.mark.parametrize(
    ("words", "target", "expected"),
    [
        ([], "run_demo", ("runs/demo", 0, False)),
        (["--seed", "2", "--overwrite"], "run_demo", ("runs/demo", 2, True)),
        (["--steps=5"], "run_demo", ("runs/demo", 0, False)),
        (["--teacher"], "train_teacher", ("runs/demo-teacher", 0, False)),
        (["--teacher", "--output_dir", "t"], "train_teacher", ("t", 0, False)),
    ],
)
def test_demo(
    monkeypatch: pytest.MonkeyPatch, words: list[str], target: str, expected: tuple[Any, ...]
) -> None:
    calls = record(monkeypatch, f"dudi.demo.{target}")
    assert cli.main(["demo", *words]) == 0
    (((folder,), kwargs),) = calls
    assert (folder, kwargs["seed"], kwargs["overwrite"]) == expected
    assert kwargs.get("steps") == (5 if "--steps=5" in words else None)


def test_lexicon(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, "dudi.lexicon_build.run_lexicon")
    words = ["--dataset_name", "d.jsonl", "--output=l.tsv", "--languages", "[id, th]"]
    assert cli.main(["lexicon", *words, "--min_dice", "1"]) == 0
    ((_, kwargs),) = calls
    assert kwargs["languages"] == ["id", "th"] and kwargs["tokenizer_name_or_path"] is None
    assert (kwargs["output"], kwargs["pivot"], kwargs["min_dice"]) == ("l.tsv", "en", 1.0)


def test_report_prints_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = record(monkeypatch, "dudi.report.write_report", Path("runs/x/report.html"))
    assert cli.main(["report", "runs/x"]) == 0
    assert calls == [(("runs/x", None), {})]
    assert capsys.readouterr().out == "runs/x/report.html\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'"),
        (["train", "--lerning_rate", "1"], "unknown config key 'lerning_rate'; did you mean"),
        (["train", "oops"], "expected --name, got 'oops'"),
        (["train", "--config"], "--config must be followed by a YAML file"),
        (["train", "--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["train", "--output_dir", "x"], "exactly one of model_name_or_path and model_config"),
        (["evaluate", "--dataset_name", "d"], "--model_name_or_path must be given"),
        (["evaluate", "--model_name_or_path", "m"], "tasks or dataset_name must be given"),
        (["compare", "--page", "c.html"], "--runs must be given"),
        (["compare", "nowhere.json"], "got nowhere.json: no such file"),
        (["evaluate", "--batch_size", "many"], "batch_size must be int, got 'many' (str)"),
        (["demo", "--teacher", "--steps", "5"], "steps is for the students"),
        (["demo", "--sed", "1"], "unknown config key 'sed'; did you mean 'seed'?"),
    ],
)
def test_mistakes_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_debugging_and_interrupting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dudi.cli.show_help", press)
    assert cli.main([]) == 130
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("DUDI_DEBUG", "1")
    with pytest.raises(ValueError, match="trian"):
        cli.main(["trian"])


def test_a_non_finite_loss_is_no_mistake_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*args: Any) -> None:
        raise NonFiniteLossError("loss is nan at step 3, rows 4, 5")

    monkeypatch.setattr("dudi.cli.show_help", diverge)
    assert cli.main([]) == 1
    assert capsys.readouterr().err == "error: loss is nan at step 3, rows 4, 5\n"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(recipe: Path) -> None:
    _, config = parse(str(recipe), ["--use_cpu", "--report_to", "none"])
    assert not Path(str(config.output_dir)).is_absolute()
    assert config.needs_teacher == config.needs_samples == recipe.stem.startswith("dudi")


def test_recipes_ship() -> None:
    assert {path.stem for path in RECIPES} >= {"sft", "teacher-from-scratch"}
