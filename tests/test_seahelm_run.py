"""`dudi seahelm prepare` and `run`, against a checkout that runs (seahelm_fake)."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from seahelm_fake import make_checkout
from test_export import GENERATION, make_model, run_of, weights

from dudi import cli
from dudi.saving import flaw
from dudi.seahelm.checkout import open_checkout
from dudi.seahelm.launch import SeahelmError, make_plan, run_seahelm
from dudi.seahelm.prepare import prepare
from dudi.seahelm.report import to_dict
from dudi.seahelm.scores import collect


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return prepare(str(run_of(folder / "first")), folder / "out", languages="id,fil")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "sea helm")  # a space: quoting is not left out


def launch(made: Path, checkout: Path, results: Path, **options: Any) -> list[Any]:
    given = {"seeds": [11, 12], "python": sys.executable, "output_dir": results, **options}
    return run_seahelm(made, checkout, **given)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def result_values(results: Path) -> list[Any]:
    return [
        json.loads(path.read_text()) for path in sorted(results.glob("first/run_*/results/*.json"))
    ]


# ---- prepare -------------------------------------------------------------------------------------


def test_what_is_prepared(tmp_path: Path) -> None:
    run = run_of(tmp_path / "first", config={"chat_template_kwargs": {"enable_thinking": False}})
    out = prepare(str(run), tmp_path / "out", languages="id,fil", no_judge_tasks=True)
    assert sorted(p.name for p in out.iterdir()) == [
        "first", "run.sh", "seahelm.json", "task_config.yaml",
    ]  # fmt: skip
    assert flaw(out / "first") is None
    assert (out / "first" / "generation_config.json").read_bytes() == GENERATION.encode()
    assert weights(out / "first").keys() == weights(run / "model").keys()
    suite = yaml.safe_load((out / "task_config.yaml").read_text())
    assert list(suite) == ["dudi"] and list(suite["dudi"]) == ["id", "tl"]
    assert "translation-en-xx" in suite["dudi"]["id"] and "mp-r" in suite["dudi"]["id"]
    assert not {"mt-bench-judge", "syntax-criteria", "kalahi-judge"} & {
        name for names in suite["dudi"].values() for name in names
    }
    settings = json.loads((out / "seahelm.json").read_text())
    assert settings["model_args"].endswith("tensor_parallel_size=auto,enable_thinking=False")
    assert [p.name for p in tmp_path.iterdir()] in (["first", "out"], ["out", "first"])


def test_a_base_model_needs_no_template_and_is_spared_instructions(tmp_path: Path) -> None:
    source = make_model(tmp_path / "base")
    (source / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"has no chat template, .* --base_model"):
        prepare(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = prepare(str(source), tmp_path / "out", base_model=True, no_metricx=True, name="b")
    names = {
        n
        for t in yaml.safe_load((out / "task_config.yaml").read_text())["dudi"].values()
        for n in t
    }
    assert not {"if-eval", "mt-bench-judge", "kalahi-mc", "translation-en-xx"} & names
    assert "--is_base_model" in (out / "run.sh").read_text()
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    given = prepare(str(source), tmp_path / "with", chat_template=str(tmp_path / "t.jinja"))
    assert (given / "base" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_bad_options_of_prepare(tmp_path: Path) -> None:
    source = str(make_model(tmp_path / "source"))
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"languages": "id,xx"}, "languages must be among .* got 'xx'"),
        ({"languages": ","}, "languages must name at least one"),
        ({"model_type": "hf"}, "model_type must be one of vllm, online_vllm, online_sglang"),
        ({"model_args": "a=1, b=2"}, "without spaces"),
        ({"name": "a/b"}, "name must be that of a folder, got 'a/b'"),
        ({"chat_template": "none.jinja"}, "chat_template must be a Jinja file"),
    )
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            prepare(source, tmp_path / "out", **options)
    out = prepare(source, tmp_path / "out", languages="th")
    (out / "results").mkdir()
    with pytest.raises(ValueError, match="has results of SEA-HELM in it: not overwritten"):
        prepare(source, out, languages="th", overwrite=True)


# ---- run -----------------------------------------------------------------------------------------


def test_runs_of_seeds_and_their_report(made: Path, checkout: Path, tmp_path: Path) -> None:
    before = contents(checkout)
    outcomes = launch(made, checkout, tmp_path / "results")
    assert [(o.run, o.seed, o.code, o.problem) for o in outcomes] == [
        (0, 11, 0, None),
        (1, 12, 0, None),
    ]
    assert contents(checkout) == before
    log = (tmp_path / "results" / "logs" / "run_1.log").read_text()
    assert "--run 1 --seed 12" in log and "serving llama enable_prefix_caching=True" in log
    assert log.endswith("# exit status 0\n")

    (model,) = collect([tmp_path / "results"])
    assert model.notes == [] and model.name == "first"
    # the stand-in aggregates by itself, and as SEA-HELM does without syntax-criteria
    assert model.nodes["tl",].value == pytest.approx(model.recorded("tl"))
    kept = [model.nodes["id", "linguistic-diagnostics", n].value for n in ("mp-r", "pragmatics")]
    more = sum(kept) / 2 - model.nodes["id", "linguistic-diagnostics"].value
    competencies = len(model.children(("id",)))
    assert model.nodes["id",].value + more / competencies == pytest.approx(model.recorded("id"))
    assert [run["seed"] for run in to_dict([model])["models"][0]["runs"]] == [11, 12]

    again = launch(made, checkout, tmp_path / "results", seeds=[11, 12, 13])  # one more
    assert [o.code for o in again] == [None, None, 0]
    assert len(result_values(tmp_path / "results")) == 3


def test_the_script_does_the_same_without_us(made: Path, checkout: Path, tmp_path: Path) -> None:
    launch(made, checkout, tmp_path / "ours")
    command = ["sh", str(made / "run.sh"), str(checkout), str(tmp_path / "theirs")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "SEEDS": "11 12"}
    for _ in range(2):  # it can be started again
        subprocess.run(command, env=environment, check=True, capture_output=True)
    assert result_values(tmp_path / "theirs")[::2] == result_values(tmp_path / "ours")


def test_the_commands_of_the_guide(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/seahelm.md, with a uv that has one environment."""
    text = (Path(__file__).parents[1] / "docs" / "seahelm.md").read_text()
    commands = text.split("```sh\n")[1].split("```")[0].splitlines()
    here = tmp_path / "work"
    run_of(here / "runs" / "first")
    checkout.rename(tmp_path / "SEA-HELM")
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\nshift 4\nexec "{sys.executable}" "$@"\n')
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:/usr/bin:/bin")
    monkeypatch.chdir(here)
    done = 0
    for command in filter(None, commands):
        words = shlex.split(command)
        assert words[0] == "dudi"
        more = ["--seeds", "[1, 2]"] if words[1:3] == ["seahelm", "run"] else []
        assert cli.main([*words[1:], *more]) == 0
        done += 1
    assert done == 4 and (here / "reports" / "seahelm.html").exists()


def test_a_failed_run_is_told_and_gone_on_with(
    made: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EXIT", "3")
    with pytest.raises(SeahelmError) as told:
        launch(made, checkout, tmp_path / "results")
    for run, seed in ((0, 11), (1, 12)):
        assert (
            f"run {run}, seed {seed}: exit status 3; it wrote no result file with totals, see "
            f"{tmp_path}/results/logs/run_{run}.log"
        ) in str(told.value)
    monkeypatch.delenv("FAKE_EXIT")
    assert [o.code for o in launch(made, checkout, tmp_path / "results")] == [0, 0]


def test_a_failed_task_is_told_and_tried_again(
    made: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEA-HELM counts 0 for it and ends as if nothing were wrong."""
    monkeypatch.setenv("FAKE_ERROR", "id/nli tl/abssum")
    with pytest.raises(SeahelmError, match="could not evaluate id/nli, tl/abssum, see"):
        launch(made, checkout, tmp_path / "results", seeds=[5])
    (model,) = collect([tmp_path / "results"])
    assert "run 0: id/nli failed and counts 0" in model.notes
    monkeypatch.delenv("FAKE_ERROR")
    (outcome,) = launch(made, checkout, tmp_path / "results", seeds=[5])
    assert (outcome.code, outcome.problem) == (0, None)
    assert collect([tmp_path / "results"])[0].notes == []


def test_a_stopped_run_says_how_to_go_on(
    made: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dudi.seahelm.launch._call", stop)
    with pytest.raises(KeyboardInterrupt, match="Stopped in run 0; the same command goes on"):
        launch(made, checkout, tmp_path / "results")
    monkeypatch.undo()
    assert [o.code for o in launch(made, checkout, tmp_path / "results")] == [0, 0]


def test_a_dry_run_prints_what_would_run(
    made: Path, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prepared", str(made), "--checkout", str(checkout), "--output_dir", str(tmp_path)]
    assert cli.main(["seahelm", "run", *words, "--seeds", "[4, 5]", "--dry_run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "tested against v1.2.1 (6844e6c)" in shown[0] and "version 1.2.0" in shown[0]
    assert shlex.split(shown[1]) == ["cd", str(tmp_path / "_checkout")]
    uv = ["uv", "run", "--project", str(checkout), "python", "src/seahelm_evaluation.py"]
    assert [shlex.split(line)[:6] for line in shown[2:]] == [uv, uv]
    assert shlex.split(shown[3])[6:] == [
        "--tasks", "dudi", "--output_dir", str(tmp_path), "--model_type", "vllm",
        "--model_name", str(made / "first"),
        "--model_args", "enable_prefix_caching=True,tensor_parallel_size=auto",
        "--run", "1", "--seed", "5",
    ]  # fmt: skip
    assert not (tmp_path / "first").exists()


def test_results_of_something_else_are_refused(made: Path, checkout: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    launch(made, checkout, results, seeds=[1])
    with pytest.raises(ValueError, match=r"has runs of seeds \[1\], now \[2\]: choose another"):
        launch(made, checkout, results, seeds=[2])
    with pytest.raises(ValueError, match="has runs with limit None, now 5: choose another"):
        launch(made, checkout, results, seeds=[1], limit=5)
    other = tmp_path / "other"
    shutil.copytree(made, other)
    (other / "task_config.yaml").write_text("dudi: {id: [qa]}")
    with pytest.raises(ValueError, match="has runs with prepared"):
        launch(other, checkout, results, seeds=[1])


def test_bad_options_of_run(made: Path, checkout: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"seeds": [1, 1]}, r"seeds must be distinct, at least one, got \[1, 1\]"),
        ({"seeds": []}, "seeds must be distinct, at least one"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"checkout": tmp_path / "gone"}, "checkout must be a folder"),
        ({"checkout": tmp_path}, "is not SEA-HELM: it has no src/seahelm_evaluation.py"),
        ({"prepared": tmp_path}, "prepared must be a folder of `dudi seahelm prepare`"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(**({"prepared": made, "checkout": checkout} | options))
    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    (broken / "first" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not whole: config\.json has 2 bytes"):
        make_plan(broken, checkout)
    with pytest.raises(ValueError, match="no-such-python can't be started"):
        launch(made, checkout, tmp_path / "results", python="no-such-python")


def test_checkouts_that_do_not_fit(made: Path, checkout: Path) -> None:
    config = checkout / "seahelm_tasks" / "nlr" / "nli" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    del content["nli"]["languages"]["tl"]
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="has task 'nli' in id, th, not in tl"):
        make_plan(made, checkout)
    config.unlink()
    with pytest.raises(ValueError, match="has no task 'nli'"):
        make_plan(made, checkout)
    entry = checkout / "src" / "seahelm_evaluation.py"
    shutil.copytree(made, made.parent / "moved", dirs_exist_ok=True)
    settings = json.loads((made / "seahelm.json").read_text())
    settings["suite"] = {"id": ["qa"]}
    (made.parent / "moved" / "seahelm.json").write_text(json.dumps(settings))
    entry.write_text(entry.read_text().replace('"--run"', '"--run_number"'))
    with pytest.raises(ValueError, match=r"src/seahelm_evaluation.py has no option --run$"):
        make_plan(made.parent / "moved", checkout)


def test_the_version_of_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_checkout(checkout).commit is None
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "a")
        monkeypatch.setenv(f"{name}_EMAIL", "a@b.c")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    found = open_checkout(checkout)
    assert found.commit is not None and found.commit[:7] in found.told()
    assert "tasks and result files may differ" in found.told()
    monkeypatch.setattr("dudi.seahelm.checkout.facts", lambda: {
        "version": "v9", "commit": found.commit,
    })  # fmt: skip
    assert open_checkout(checkout).told().endswith("the version that this was tested against")
