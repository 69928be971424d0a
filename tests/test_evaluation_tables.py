"""What `dudi evaluate` and `dudi compare` print, and colours of runs: every number whole, at 80
columns, with a dozen languages, as many figures, names that look like markup."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dudi.evaluation import FIGURES, Result, TaskResult, compare
from dudi.evaluation.page import render
from dudi.evaluation.plot import write_plot
from dudi.evaluation.tables import show_comparison, show_result, spelt, with_interval

LANGUAGES = ["en", "fil", "id", "jv", "km", "lo", "ms", "my", "su", "ta", "th", "vi"]
OF_CHOICES = ("accuracy", "accuracy_by_bytes", "ece_choices")


def result(name: str, seed: int = 0, *, kl: bool = True) -> Result:
    """Rows with all that a task of texts is measured by."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(12 * len(LANGUAGES)):
        tokens = 3 + i % 20
        row: dict[str, Any] = {
            "row": i, "language": LANGUAGES[i % len(LANGUAGES)], "group": str(i),
            "nll": float(random.gamma(2.0, 1.0)) * tokens, "tokens": tokens,
            "chars": 3 * tokens, "bytes": 7 * tokens,
            "token_bins": [[3, tokens, tokens / 4, tokens // 3]], "chrf": [9, 9, 4 + i % 3] * 8,
            "written": 30 + i % 9, "reference": 40, "judged": 1, "faithful": int(i % 5 > 0),
            "faithful_reference": 1,
        }  # fmt: skip
        rows.append(row | ({"kl": row["nll"] / 9, "taught": tokens} if kl else {}))
    return Result(name, {"t": TaskResult("t", "About.", {"sha256": "same"}, rows, resamples=20)})


def shown(show: Any, *arguments: Any, width: int = 80) -> str:
    screen = io.StringIO()
    show(*arguments, Console(file=screen, width=width))
    return screen.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_tables_of_a_dozen_languages(width: int) -> None:
    own = result("one")
    text = shown(show_result, own, width=width)
    task, lines = own.tasks["t"], text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(task.figures) == len(FIGURES) - len(OF_CHOICES)
    for name, languages in task.figures.items():
        for code, estimate in languages.items():
            told = with_interval(estimate, FIGURES[name].digits)
            assert any(f" {told} " in line and f" {code} " in line for line in lines), (name, code)
    assert text.count("┏") <= 3  # tables
    assert "95 % intervals over rows, not over seeds of training" in lines[-1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_comparisons_of_many_runs(count: int) -> None:
    names = ["first", "a-run-with-quite-a-long-name-as-folders-have", "c[x]", "d", "e"][:count]
    comparison = compare([result(name, seed) for seed, name in enumerate(names)])
    text = shown(show_comparison, comparison)
    assert max(map(len, text.splitlines())) <= 80
    for line in comparison.of("t", "mean"):
        digits = FIGURES[line.figure].digits
        for value in line.values:
            assert spelt(value.value, digits) in text
        for change in line.differences[1:]:
            assert with_interval(change, digits, True) in text
    assert ("c[x]" in text) == (count > 2)


def test_brackets_are_no_markup() -> None:
    own = result("one")
    own.tasks["t"].notes.append("needs py3langid (pip install 'dudi[eval]')")
    own.skipped["udhr"] = "/data/[old]/udhr.jsonl is not there"
    for text in (shown(show_result, own), shown(show_comparison, compare([own]))):
        assert "udhr was skipped: /data/[old]/udhr.jsonl is not there" in text
    assert "pip install 'dudi[eval]'" in shown(show_result, own)


def test_a_task_without_figures_says_so() -> None:
    rows = [{"row": 0, "language": "th", "group": "0"}]
    own = Result("one", {"t": TaskResult("t", "About.", {"sha256": "x"}, rows)})
    assert shown(show_result, own) == "t: none of its metrics could be measured\n"


def test_a_run_keeps_its_colour(tmp_path: Path) -> None:
    """In charts of figures that another run has not, too."""
    pytest.importorskip("matplotlib")
    results = [result("a"), result("b", kl=False), result("c", 2)]
    comparison = compare(results)
    for part in render(comparison).split("<section")[1:]:
        bars = re.findall(r'<g class="r(\d)"><title>(\w) ', part)
        there = "ac" if "KL to teacher" in part else "abc"
        assert {(place, name) for place, name in bars} == {(str("abc".index(n)), n) for n in there}
        heads = re.findall(r'<i class="swatch r(\d)"></i>(\w)</th>', part)
        assert heads == [("0", "a"), ("1", "b"), ("2", "c")]
    text = write_plot(comparison, tmp_path / "c.svg").read_text(encoding="utf-8")
    dots = re.findall(r"<use[^>]*style=\"fill: (#\w+)", text)
    assert sorted(set(dots), key=dots.index)[:3] == ["#1f77b4", "#ff7f0e", "#2ca02c"]
    counts = {colour: dots.count(colour) for colour in dots}
    assert counts["#1f77b4"] == counts["#2ca02c"] == counts["#ff7f0e"] + 1
