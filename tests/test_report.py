"""The report, from folders like those that runs leave behind."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dudi import report, report_figures
from dudi.demo_data import LANGUAGES, ui_strings

LEVELS = {"teacher": 1.61, "warm": 2.63, "sft": 2.26, "dudi": 1.94, "before": 2.63, "after": 1.94}
LOSSES = {
    "warm": ("ce_loss",),
    "sft": ("ce_loss",),
    "dudi": ("off_policy_loss", "on_policy_loss", "preference_loss", "ce_loss"),
}
ENVIRONMENT = {"dudi": "0.1.0", "torch": "2.13.0", "cpu": "Some CPU @ 2.10GHz x 2", "threads": 2}


def evaluation(label: str) -> dict[str, Any]:
    """Figures of a plausible model, and what it wrote: the reference's words, some of them."""
    level = LEVELS[label]
    languages, samples = {}, []
    for i, code in enumerate(("en", *LANGUAGES)):
        own = level * (0.8 + 0.05 * i)
        languages[code] = {
            "nll_per_char": own,
            "nll_per_token": own * 3.3,
            "kl_to_teacher": 0.0 if label == "teacher" else (own - 1.2) * 1.1,
            "chrf": 62 - 17 * own,
            "rows": 130.0,
            "tokens": 2300.0,
            "chars": 6900.0,
        }
        for row, item in enumerate(ui_strings()[40:440:80]):
            source = "th" if code == "en" else "en"
            kept = max(1, int(len(item[code]) * 1.5 / level))
            samples.append(
                {
                    "language": code,
                    "row": 18 * row + i,
                    "prompt": f"Translate from {source} to {code}: {item[source]}",
                    "reference": item[code],
                    "generation": "" if row == 3 else item[code][:kept],
                }
            )
    names = languages["en"]
    mean = {k: sum(v[k] for v in languages.values()) / len(languages) for k in names}
    return {"languages": languages, "mean": mean, "samples": samples}


def metrics(run: str, steps: int = 200, every: int = 5) -> list[dict[str, Any]]:
    """Loss curves that fall with a wobble; the last record is the Trainer's summary."""
    records: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        end = 6 if run == "warm" else 4.5
        fall = end + 3 * math.exp(-step / 60) + 0.15 * math.sin(2.7 * step)
        signals = {name: fall / (i + 1) for i, name in enumerate(LOSSES[run])}
        own = {"step": step, "loss": sum(signals.values()), "entropy": fall / 2, "epoch": step / 99}
        records.append({**own, **signals, "num_tokens": 3e4 * step})
    return [*records, {"step": steps, "train_runtime": 84.2, "train_loss": 5.5}]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_metrics(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def run_info(run: str, **more: Any) -> dict[str, Any]:
    return {
        "title": run,
        "command": f"dudi train --config {run}.yaml --seed 0",
        "script": {"dataset_name": "data.jsonl", "model_config": {"model_type": "llama"}},
        "config": {"learning_rate": 0.002, "ce_weight": 1.0, "beta": None, "seed": 0},
        "environment": ENVIRONMENT,
        "started": "2026-03-01T09:26:00+00:00",
        "seconds": 84.2,
        "steps": 200,
        "parameters": 2_140_000,
        "teacher_parameters": 7_090_000,
        "languages": ["en", *LANGUAGES],
        "data": {"train": {"rows": 13_812, "truncated_prompts": 3, "dropped": 0}},
        **more,
    }


def train_folder(folder: Path) -> Path:
    write_json(folder / "run.json", run_info("thai-student"))
    write_metrics(folder / "metrics.jsonl", metrics("dudi", 1500))
    write_json(folder / "evaluation.json", {k: evaluation(k) for k in ("before", "after")})
    return folder


def demo_folder(folder: Path) -> Path:
    merged = []
    for minute, run in enumerate(LOSSES):
        started = f"2026-03-01T09:2{minute}:00+00:00"
        weight = 0.2 if run == "dudi" else 1
        config = {"learning_rate": 0.002, "max_steps": 200, "ce_weight": weight}
        write_json(folder / run / "run.json", run_info(run, started=started, config=config))
        write_metrics(folder / run / "metrics.jsonl", metrics(run))
        merged += [{"run": run, **record} for record in metrics(run)]
    write_metrics(folder / "metrics.jsonl", merged)
    evaluations = {label: evaluation(label) for label in ("teacher", "warm", "sft", "dudi")}
    write_json(folder / "evaluation.json", evaluations)
    summary = {
        label: {
            "parameters": 7_090_000 if label == "teacher" else 2_140_000,
            "optimizer_steps": 1800 if label == "teacher" else 200,
            "seconds": 1086.2 if label == "teacher" else 84.2,
            "mean": own["mean"],
            "languages": own["languages"],
        }
        for label, own in evaluations.items()
    }
    write_json(folder / "summary.json", {"seed": 0, **summary})
    info = run_info("DuDi demo", command="dudi demo --seed 0", seconds=402.0, config={})
    write_json(folder / "run.json", info)
    return folder


class Page(HTMLParser):
    """Sections by heading, the text, bold figures and whatever a browser would go and fetch."""

    VOID = ("meta", "line", "polyline", "link", "img", "br")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.count: dict[str, int] = {}
        self.bold: list[str] = []  # in the table of models
        self.feed(html)
        self.close()
        assert not self.open, f"unclosed: {self.open}"
        if re.search(r"url\(|@import", html):
            self.fetched.append("css")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag in ("script", "link", "img", "iframe") or {"src", "href"} & {k for k, _ in attrs}:
            self.fetched.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID, tag
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open[-2:] == ["td", "b"] and self.headings[-1] == "The models":
            self.bold.append(data)
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(folder: Path) -> Page:
    return Page(report.write_report(folder).read_text(encoding="utf-8"))


def test_demo(tmp_path: Path) -> None:
    found = page(demo_folder(tmp_path))
    assert found.fetched == []
    assert found.headings == [
        "The models", "Loss curves", "By language", "What the models write", "What was run",
    ]  # fmt: skip
    assert (
        "DuDi reaches 1.989 nats per character on held-out text, against 2.317 for cross-entropy "
        "alone from the same start (−14.2 %), averaged over 10 languages, and is closer to its "
        "teacher: a KL of 0.867 against 1.228 ."
    ) in found.text
    assert found.count["svg"] == 6  # total, three signals, cross-entropy, entropy
    assert found.count["polyline"] == 2 * (3 + 1 + 1 + 1 + 3 + 3)
    assert found.bold == ["1.989", "6.562", "0.867", "28.2"]  # of the models, the best student's
    assert "2.14 M" in found.text and "18 min 6 s" in found.text and "(nothing)" in found.text
    assert ui_strings()[40]["km"] in found.text
    assert [p.name for p in tmp_path.glob("report*")] == ["report.html"]


def test_train_run(tmp_path: Path) -> None:
    found = page(train_folder(tmp_path))
    assert found.headings == ["Loss curves", "By language", "What the models write", "What was run"]
    assert "200 steps took held-out text from 2.696 to 1.989 nats per character" in found.text
    assert "13,812 rows, 3 truncated prompts" in found.text
    assert "ce_weight 1.0" in found.text and "beta" not in found.text  # None everywhere


def test_best_of_the_trained_models_is_marked() -> None:
    """The lowest NLL and the highest chrF, never the teacher's; bars against the longest."""
    labels = ("teacher", "warm", "sft", "dudi")
    found = report.results({label: evaluation(label) for label in labels})
    assert [r.figure.key for r in found] == [f.key for f in report.FIGURES]
    for result in found:
        assert [code for code, _ in result.rows][:3] == ["mean", "my", "en"]  # Burmese, English
        for _, cells in result.rows:
            assert [cell.best for cell in cells] == [False, False, False, True]
        assert max(cell.share for _, cells in result.rows for cell in cells) == 100


def test_a_figure_of_zero_is_told_unless_it_says_nothing() -> None:
    """A chrF of 0 everywhere is a result; the KL of the teacher from itself is none."""
    zero = {"kl_to_teacher": 0.0, "chrf": 0.0, "nll_per_char": None, "nll_per_token": math.nan}
    found = report.results({k: {"languages": {"th": zero}} for k in ("before", "after")})
    assert [(r.figure.key, [c.text for c in r.rows[0][1]]) for r in found] == [
        ("chrf", ["0.0", "0.0"])
    ]


@pytest.mark.parametrize(
    ("missing", "headings"),
    [
        (("evaluation.json",), ["Loss curves", "What was run"]),
        (("metrics.jsonl", "run.json"), ["By language", "What the models write", "What was run"]),
        (("metrics.jsonl", "evaluation.json"), ["What was run"]),
    ],
)
def test_missing_files_leave_sections_out(
    tmp_path: Path, missing: tuple[str, ...], headings: list[str]
) -> None:
    folder = train_folder(tmp_path)
    for name in missing:
        (folder / name).unlink()
    assert page(folder).headings == headings


def test_unfinished_demo_reads_the_runs_inside(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path)
    for name in ("metrics.jsonl", "evaluation.json", "summary.json"):
        (folder / name).unlink()
    assert page(folder).headings == ["Loss curves", "What was run"]
    assert list(report.collect(folder).metrics) == ["warm", "sft", "dudi"]


def test_text_is_escaped_and_gaps_are_dashes(tmp_path: Path) -> None:
    """What a model or a user wrote never becomes markup; null, NaN and one point do no harm."""
    own = evaluation("after")
    own["samples"][0]["generation"] = "<script>alert(1)</script> & {{ 7 * 7 }}"
    own["languages"]["th"]["chrf"] = own["mean"]["chrf"] = None
    for values in (*own["languages"].values(), own["mean"]):
        values["kl_to_teacher"] = None
    write_json(tmp_path / "evaluation.json", {"after": own})
    write_json(tmp_path / "run.json", {"title": "<b>t</b>", "environment": {"gpu": None}})
    one_point = {"step": 1, "loss": 2.0}
    write_metrics(tmp_path / "metrics.jsonl", [one_point, {"step": 2, "loss": math.nan}])
    found = page(tmp_path)
    assert "<script>alert(1)</script> & {{ 7 * 7 }}" in found.text and "<b>t</b>" in found.text
    assert "svg" not in found.count and "KL to teacher" not in found.text
    assert re.search(r"Mean (\S+ )?–", found.text) and "nan" not in found.text.lower().split()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", r"run_dir must hold one of run\.json, .*, got .*folder"),
        ("run.json", "{", r"run\.json must hold JSON"),
        ("evaluation.json", "[]", r"evaluation\.json must hold a JSON object, got list"),
        (
            "evaluation.json",
            '{"after": 3}',
            r"'after' of .*\.json must hold a JSON object, got int",
        ),
        ("metrics.jsonl", "3\n", r"metrics\.jsonl, line 1, must hold a JSON object, got int"),
        ("metrics.jsonl", '{"st\n{"step": 1}\n', r"metrics\.jsonl, line 1, must hold JSON"),
    ],
)
def test_unreadable(tmp_path: Path, name: str | None, text: str, message: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if name:
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        report.write_report(folder)
    assert not (folder / "report.html").exists()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a folder, got .*nowhere"):
        report.write_report(tmp_path / "nowhere")


def test_killed_run_and_other_output(tmp_path: Path) -> None:
    """A line cut short by a kill costs that line; the report goes where it is asked to."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"st')
    path = report.write_report(tmp_path, tmp_path / "other" / "page.html")
    assert path == tmp_path / "other" / "page.html" and path.exists()
    assert "training loss from 3.000 to 2.000" in Page(path.read_text(encoding="utf-8")).text


def test_headline_tells_a_loss_too(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path)
    evaluations = {"sft": evaluation("dudi"), "dudi": evaluation("sft")}
    write_json(folder / "evaluation.json", evaluations)
    text = page(folder).text
    assert "no better than" in text and "is not closer to its teacher" in text


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3.2, 41.0), (1799.0, 1801.0), (1e-6, 3e-6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    marks = report_figures.ticks(low, high)
    assert 2 <= len(marks) <= 6 and min(marks) >= low - 1e-9 and max(marks) <= high + 1e-9
    gaps = [b - a for a, b in pairwise(marks)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
