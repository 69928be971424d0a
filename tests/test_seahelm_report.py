"""SEA-HELM's result files, made by hand as its code writes them, and what is made of them."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from seahelm_fake import TIME, accuracy, sample, write_run

from dudi import cli
from dudi.seahelm import facts, report, scores

EXPECTED = {
    (): (205.66666666666666 / 4 + 31.25) / 2,
    ("id",): 205.66666666666666 / 4,
    ("id", "nlu"): 140 / 3,
    ("id", "nlu", "sentiment"): 40.0,
    ("id", "nlu", "qa"): 50.0,
    ("id", "nlu", "metaphor"): 50.0,
    ("id", "nlg"): 45.0,
    ("id", "nlg", "translations"): 70.0,
    ("id", "nlg", "translations", "translation-en-xx"): 80.0,
    ("id", "nlg", "translations", "translation-xx-en"): 60.0,
    ("id", "nlg", "abssum"): 20.0,
    ("id", "linguistic-diagnostics"): 50.0,
    ("id", "linguistic-diagnostics", "mp-r"): 60.0,
    ("id", "linguistic-diagnostics", "pragmatics"): 40.0,
    ("id", "instruction-following"): 64.0,
    ("id", "instruction-following", "if-eval"): 64.0,
    ("th",): 31.25,
    ("th", "safety"): 40.0,
    ("th", "safety", "toxicity"): 40.0,
    ("th", "knowledge"): 22.5,
    ("th", "knowledge", "thai_exam"): 22.5,
    ("th", "knowledge", "thai_exam", "thai_exam_onet"): 25.0,
    ("th", "knowledge", "thai_exam", "thai_exam_ic"): 20.0,
}


def collected(folder: Path) -> scores.Model:
    (model,) = scores.collect([folder])
    return model


def test_every_level_is_the_mean_of_what_is_below(tmp_path: Path) -> None:
    write_run(tmp_path, sample())
    model = collected(tmp_path)
    assert model.notes == []
    assert {n: e.value for n, e in model.nodes.items()} == pytest.approx(EXPECTED, rel=1e-12)
    assert model.recorded("id") == pytest.approx(EXPECTED["id",])  # SEA-HELM's own totals
    assert model.recorded("") == pytest.approx(EXPECTED[()])
    told = model.scores["id", "translation-en-xx"]
    assert (told.score, told.baseline, told.maximum) == (5, 25, 0)


def test_what_a_judge_adds_counts_though_the_results_leave_it_out(tmp_path: Path) -> None:
    content = sample()
    content["id"]["linguistic-diagnostics"]["syntax-criteria"] = {"average_criteria_score": 20.0}
    write_run(tmp_path, content)
    model = collected(tmp_path)
    assert model.nodes["id", "linguistic-diagnostics"].value == pytest.approx((60 + 40 + 20) / 3)


# ---- over seeds ----------------------------------------------------------------------------------


def test_intervals_are_those_of_each_level(tmp_path: Path) -> None:
    """Two tasks that move against each other: wide intervals, none above them."""
    for run, shift in enumerate((-9, 0, 9)):
        content = {
            "th": {
                "safety": {"toxicity": accuracy(70 + shift, 2), "total": 40.0 + 2 * shift},
                "nlr": {"causal": accuracy(70 - shift, 2), "total": 40.0 - 2 * shift},
                "total": 40.0,
            },
            "total": 40.0,
        }
        write_run(tmp_path, content, run=run, seed=run)
    model = collected(tmp_path)
    safety = model.nodes["th", "safety"]
    assert safety.runs == pytest.approx((22, 40, 58)) and safety.value == pytest.approx(40)
    assert safety.half == pytest.approx(4.3026527 * 18 / math.sqrt(3), rel=1e-8)
    assert model.nodes[()].half == pytest.approx(0, abs=1e-9)


def test_one_run_has_no_interval_and_says_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path, sample())
    assert math.isnan(collected(tmp_path).nodes[()].half)


def test_what_is_run_once_stands_for_all_runs(tmp_path: Path) -> None:
    """Tasks by log-probabilities are in the first run alone."""
    first, second = sample(), sample()
    first["th"]["nlr"] = {
        "causal-logprobs": {"average_cumulative_probabilities": 80.0},
        "total": 80.0,
    }
    write_run(tmp_path, first, run=0, seed=1)
    write_run(tmp_path, second, run=1, seed=2)
    model = collected(tmp_path)
    assert model.nodes["th", "nlr", "causal-logprobs"].runs == (60.0, 60.0)
    assert model.nodes["th",].runs == pytest.approx(((40 + 22.5 + 60) / 3,) * 2)


def test_runs_with_other_tasks_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, sample(), run=0, seed=1)
    content = sample()
    del content["id"]["nlu"]["qa"]
    write_run(tmp_path, content, run=3, seed=2)
    with pytest.raises(ValueError, match="runs 0 and 3 of student differ in their tasks: id/qa"):
        collected(tmp_path)


def test_only_ended_runs_count(tmp_path: Path) -> None:
    begun = copy.deepcopy(sample())
    del begun["total"]
    write_run(tmp_path, sample(), run=0, seed=1)
    write_run(tmp_path, begun, run=0, seed=1, time="2027" + TIME[4:])  # begun again, not ended
    write_run(tmp_path, begun, run=1, seed=2)
    write_run(tmp_path, '{"id": {"nl', run=2, seed=3)  # killed while it wrote
    model = collected(tmp_path)
    assert [run.number for run in model.runs] == [0]
    assert model.notes == ["run_1 has not ended: left out", "run_2 has not ended: left out"]
    with pytest.raises(ValueError, match=r"has no finished run run_N/results"):
        scores.collect([tmp_path / "student" / "run_1"])


# ---- what does not fit ---------------------------------------------------------------------------


def test_a_baseline_that_is_not_ours_is_told(tmp_path: Path) -> None:
    content = sample()
    content["th"]["safety"]["toxicity"] = accuracy(70, 3)  # 55 from 33.3, not 40 from 50
    write_run(tmp_path, content)
    model = collected(tmp_path)
    assert model.nodes["th", "safety"].value == pytest.approx(55)
    assert model.scores["th", "toxicity"].baseline == pytest.approx(100 / 3)
    assert model.notes == [
        "th/toxicity: normalised from a baseline of 33.33 by SEA-HELM, where 50 was expected; its "
        "figure is kept"
    ]


def test_tasks_beyond_the_table_are_read_from_the_configuration(tmp_path: Path) -> None:
    content = sample()
    content["th"]["safety"]["safeguard"] = accuracy(80, 2)
    content["th"]["safety"]["novel"] = {"stars": 30.0}
    tasks = {
        "safeguard": {"competency": "safety", "metric": "normalized_accuracy"},
        "novel": {"competency": "safety", "metric": "stars"},
    }
    write_run(tmp_path, content, tasks=tasks)
    model = collected(tmp_path)
    assert model.nodes["th", "safety"].value == pytest.approx((40 + 60 + 30) / 3)
    assert model.scores["th", "safeguard"].baseline == pytest.approx(50)
    assert model.notes == ["novel: stars is taken as it is, from 0 to 100"]


def test_what_spoils_a_score_is_told(tmp_path: Path) -> None:
    content = sample()
    content["id"]["nlu"]["qa"] = {"normalized_f1": 0, "error": "Failed to run evaluation for task"}
    write_run(tmp_path, content, run=0, seed=7, limit=10)
    write_run(tmp_path, sample(), run=1, seed=7)
    write_run(tmp_path, sample(), run=2, seed=None)
    model = collected(tmp_path)
    assert model.nodes["id", "nlu", "qa"].runs == (0, 50, 50)
    assert set(model.notes) == {
        "run 0: id/qa failed and counts 0",
        "run 0 was limited to 10 rows a task: no real score",
        f"run 2 has no student_run_config_{TIME}.yaml: its seed is not known",
        "seeds are not distinct: 7, 7",
    }


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


QA = ("id", "nlu", "qa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(*QA, value={"f1": 50.0}), r"id > nlu > qa must have 'normalized_f1', has f1"),
        (_set(*QA, value={"normalized_f1": 50.0}), "id > nlu > qa must have 'f1', has normalized_"),
        (_set(*QA, value=50.0), "id > nlu > qa must hold a JSON object, got float"),
        (_set(*QA, "normalized_f1", value="50"), "qa > normalized_f1 must be a number, got '50'"),
        (_set(*QA, "f1", value=None), "qa > f1 must be a number, got None"),
        (_set(*QA, "f1", value=math.nan), "qa > f1 must be finite, got nan"),
        (_set(*QA, "f1", value=150.0), r"qa > f1 must be in \[0, 100\], got 150"),
        (_set("id", "nlu", "chess", value={}), "chess is in neither the run's configuration nor"),
        (_set("th", "nlu", value={"toxicity": accuracy(70, 2)}), "toxicity belongs to safety"),
        (_set("id", value=3), "id must hold a JSON object, got int"),
        (_set("id", "nlu", value=[]), "id > nlu must hold a JSON object, got list"),
        (_set("id", "total", value="x"), "id > total must be a number, got 'x'"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = sample()
    change(content)
    path = write_run(tmp_path, content)
    with pytest.raises(ValueError, match=message) as told:
        scores.collect([path])
    assert str(path) in str(told.value)


def test_places_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scores.collect([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="has no result file"):
        scores.collect([tmp_path])
    begun = sample()
    del begun["total"]
    with pytest.raises(ValueError, match="has no total: the run has not ended"):
        scores.collect([write_run(tmp_path, begun)])
    with pytest.raises(ValueError, match="must hold JSON"):
        scores.collect([write_run(tmp_path, "{")])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="or files MODEL_seahelm_results_TIME"):
        scores.collect([tmp_path / "x.json"])


# ---- the table of facts --------------------------------------------------------------------------


def test_every_task_of_the_suite_is_known() -> None:
    known, tasks = facts.facts(), facts.tasks()
    names = {*tasks, *(t.group for t in tasks.values())}
    names |= {part for t in tasks.values() for part in t.parts}
    assert {name for suite in known["suite"].values() for name in suite} <= names
    assert set(known["llm_judged"]) | set(known["metricx_judged"]) <= names
    for name, task in tasks.items():
        for language in known["suite"]:
            options = task.options(language)
            assert options is None or 2 <= options <= 5, name


def test_filipino_is_tl_there() -> None:
    assert list(facts.suite(["fil", "id", "tl"], left_out=set())) == ["tl", "id"]
    with pytest.raises(ValueError, match=r"languages must be among id, .* got 'xx'"):
        facts.suite(["xx"], left_out=set())


# ---- the files -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text, and what would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(v) for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def two_models(folder: Path) -> list[Path]:
    """A model of three seeds, and one of the same name that was asked less."""
    for run in range(3):
        content = sample()
        content["id"]["instruction-following"]["if-eval"]["overall_lang_normalized_acc"] = 60 + run
        write_run(folder / "a<b", content, run=run, seed=run)
    other = sample()
    del other["th"]
    write_run(folder / "c", other)
    return [folder / "a<b", folder / "c"]


def test_reports_of_several_models(tmp_path: Path) -> None:
    places = two_models(tmp_path)
    models = scores.collect(places)
    assert [m.name for m in models] == ["a<b/student", "c/student"]
    report.write_reports(models, tmp_path / "out")

    content = json.loads((tmp_path / "out" / "seahelm.json").read_text())
    first = content["models"][0]
    assert [run["seed"] for run in first["runs"]] == [0, 1, 2]
    assert first["sea"]["mean"] == pytest.approx(EXPECTED[()] + (61 - 64) / 4 / 2)
    translations = first["languages"]["id"]["competencies"]["nlg"]["tasks"]["translations"]
    assert translations["tasks"]["translation-en-xx"] == {
        "mean": 80.0, "half_width": 0.0, "runs": [80.0] * 3, "score": 5, "baseline": 25, "max": 0,
    }  # fmt: skip
    assert content["seahelm"]["commit"] == facts.facts()["commit"]

    text = (tmp_path / "out" / "seahelm.md").read_text()
    assert "| **Thai** | **31.2 ± 0.0** | **–** |" in text
    assert "| &nbsp;&nbsp;&nbsp;&nbsp;&nbsp;&nbsp;sentiment | 40.0 ± 0.0 | 40.0 |" in text
    assert "their averages do not compare" in text

    page = Page()
    html = (tmp_path / "out" / "seahelm.html").read_text()
    page.feed(html)
    assert "script" not in page.tags and page.links == [] and "url(" not in html
    shown = re.sub(r"\s+", " ", " ".join(page.text))
    assert "a<b/student" in shown and "translation-en-xx" in shown and "25 … 0" in shown


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(place) for place in two_models(tmp_path)]
    assert cli.main(["seahelm", "report", *places, "--output_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "Indonesian" in shown and "51.4" in shown and "sentiment" not in shown
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "seahelm.json", "seahelm.md", "seahelm.html",
    }  # fmt: skip
    assert cli.main(["seahelm", "report", places[0], "--tasks"]) == 0
    assert "sentiment" in capsys.readouterr().out
    assert cli.main(["seahelm", "report", str(tmp_path / "none")]) == 2
    assert cli.main(["seahelm", "reprot"]) == 2
    assert "must be followed by prepare, run, report, got 'reprot'" in capsys.readouterr().err
    assert cli.main(["seahelm", "--help"]) == 0
    assert "--no_judge_tasks" in capsys.readouterr().out
