"""Intervals and paired differences: against resampling by hand, and for what they must cover."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dudi import cli
from dudi.evaluation import Result, TaskResult, compare
from dudi.evaluation.bootstrap import sampled
from dudi.evaluation.figures import FIGURES
from dudi.evaluation.page import render
from dudi.evaluation.plot import check_plot, write_plot


def rows_of(seed: int, shift: float = 0.0, count: int = 200) -> list[dict[str, Any]]:
    """Rows of two languages; a row's difficulty is shared by all runs, `shift` is the run's own."""
    hard = np.random.default_rng(7).gamma(2.0, 1.0, count)
    own = np.random.default_rng(seed).normal(shift, 0.05, count)
    return [
        {"row": i, "language": "th" if i % 2 else "vi", "group": str(i),
         "nll": float(hard[i] + own[i]), "chars": 1 + i % 5}
        for i in range(count)
    ]  # fmt: skip


def result(name: str, rows: list[dict[str, Any]], **settings: Any) -> Result:
    data = {"sha256": settings.pop("sha256", "same"), "items": len(rows)}
    return Result(name, {"t": TaskResult("t", "About.", data, rows, **settings)})


def test_intervals_are_those_of_resampled_rows() -> None:
    rows = [row for row in rows_of(0) if row["language"] == "th"]
    own = sampled(FIGURES["nll_per_char"], rows, seed=3, resamples=4000)["th"]
    nll, chars = (np.array([row[k] for row in rows]) for k in ("nll", "chars"))
    random = np.random.default_rng(99)
    draws = []
    for _ in range(4000):
        drawn = random.integers(0, len(rows), len(rows))
        draws.append(nll[drawn].sum() / chars[drawn].sum())
    assert own.value == pytest.approx(nll.sum() / chars.sum())
    width = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    low, high = own.estimate()[1:]
    assert low == pytest.approx(np.quantile(draws, 0.025), abs=0.05 * width)
    assert high == pytest.approx(np.quantile(draws, 0.975), abs=0.05 * width)


def test_seeds_and_groups() -> None:
    """A seed fixes the draws; rows of one group are drawn together, so that copies add nothing."""
    rows, figure = rows_of(0, count=40), FIGURES["nll_per_char"]
    once = sampled(figure, rows, 0)["mean"]
    assert once.estimate() == sampled(figure, rows, 0)["mean"].estimate()
    assert once.estimate() != sampled(figure, rows, 1)["mean"].estimate()
    copies = [row | {"row": 40 * k + row["row"]} for k in range(4) for row in rows]
    assert sampled(figure, copies, 0)["mean"].estimate() == pytest.approx(once.estimate())
    apart = [row | {"group": str(i)} for i, row in enumerate(copies)]
    low, high = sampled(figure, apart, 0)["mean"].estimate()[1:]
    assert high - low < 0.7 * (once.estimate().high - once.estimate().low)
    languages = sampled(figure, rows, 0)
    assert once.value == pytest.approx((languages["th"].value + languages["vi"].value) / 2)


def test_intervals_cover() -> None:
    """About 95 % of 200 samples' intervals hold the truth."""
    random, hits = np.random.default_rng(0), 0
    for trial in range(200):
        right = random.random(120) < 0.3
        rows = [
            {"row": i, "language": "th", "group": str(i), "correct": int(r), "questions": 1}
            for i, r in enumerate(right)
        ]
        own = sampled(FIGURES["accuracy"], rows, trial, 300)["th"].estimate()
        hits += own.low <= 0.3 <= own.high
    assert 0.89 <= hits / 200 <= 0.99


def test_paired_differences_see_what_intervals_do_not() -> None:
    """A shift far below the spread of rows, which are the same; and none between equals."""
    old, new = result("old", rows_of(0)), result("new", rows_of(1, -0.1))
    comparison = compare([old, new, result("equal", rows_of(0))])
    assert (comparison.baseline, comparison.notes) == ("old", [])
    (line,) = comparison.of("t", "mean")
    wide = line.values[0].high - line.values[0].low
    change = line.differences[1]
    truth = line.values[1].value - line.values[0].value
    assert change.value == pytest.approx(truth) and abs(truth) < wide / 4
    assert change.low <= truth <= change.high < 0 and change.high - change.low < wide / 4
    assert line.differences[2] == (0, 0, 0) and math.isnan(line.differences[0].value)
    assert line.verdicts == ["", "better", ""]
    assert compare([old, new], "new").of("t", "mean")[0].verdicts == ["worse", ""]
    json.dumps(comparison.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"sha256": "other"}, "t: new and old are of different items: no paired differences"),
        ({"seed": 5}, "t: new and old have other seeds or resamples: no paired differences"),
    ],
)
def test_what_is_not_paired_is_told(change: dict[str, Any], note: str) -> None:
    comparison = compare([result("old", rows_of(0)), result("new", rows_of(1), **change)])
    assert comparison.notes == [note]
    assert all(math.isnan(d.value) for line in comparison.lines for d in line.differences)


def test_few_rows_make_no_verdict() -> None:
    old, new = result("old", rows_of(0, count=8)), result("new", rows_of(0, -1.0, count=8))
    assert compare([old, new]).of("t", "mean")[0].verdicts == ["", ""]


def test_bad_comparisons() -> None:
    one = result("one", rows_of(0))
    for results, baseline, message in (
        ([], None, "results must not be empty"),
        ([one, one], None, "different names, got 'one' twice"),
        ([one], "two", "baseline must be one of one, got 'two'"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(results, baseline)


def test_compare_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables, a page that asks for nothing, JSON; two runs of one name get others."""
    for folder, shift in (("a", 0.0), ("b", -0.1)):
        own = result("model", rows_of(int(shift < 0), shift))
        own.skipped["udhr"] = "<not there>"
        own.tasks["t"].samples.append(
            {"language": "th", "row": 1, "prompt": "<b>?", "reference": "ไทย", "generation": ""}
        )
        own.save(tmp_path / folder / "tasks.json")
    runs = [str(tmp_path / "a"), str(tmp_path / "b" / "tasks.json")]
    assert cli.main(["compare", *runs]) == 2
    assert "different names, got 'model' twice" in capsys.readouterr().err
    page, found = tmp_path / "c.html", tmp_path / "c.json"
    words = ["--names", "base,mine", "--page", str(page), "--json", str(found)]
    assert cli.main(["compare", *runs, *words]) == 0
    told = capsys.readouterr().out
    assert "differences from base" in told and "udhr was skipped" in told
    text = page.read_text(encoding="utf-8")
    assert "mine" in text and "&lt;not there&gt;" in text and "&lt;b&gt;?" in text and "ไทย" in text
    assert text.count("<circle") == 6  # two runs, two languages and the mean
    assert not any(word in text for word in ("<script", "http://", "https://", "src=", "@import"))
    assert {line["language"] for line in json.loads(found.read_text())["lines"]} == {
        "mean", "th", "vi",
    }  # fmt: skip
    assert cli.main(["compare", *runs, "--plot", "c.gif"]) == 2
    assert "plot must end in one of .png, .svg, .pdf, got 'c.gif'" in capsys.readouterr().err


def test_plot(tmp_path: Path) -> None:
    comparison = compare([result("old", rows_of(0)), result("new", rows_of(1, -0.1))])
    path = write_plot(comparison, tmp_path / "plots" / "c.svg")
    assert path.read_text(encoding="utf-8").startswith("<?xml") and check_plot(path) == path
    assert [p.name for p in path.parent.iterdir()] == ["c.svg"]


def test_a_group_is_drawn_in_all_its_languages() -> None:
    """Three languages with the same strings, equally hard, are one sample and not three; languages
    without a common group are drawn apart."""
    hard = np.random.default_rng(0).gamma(2.0, 1.0, 100)
    rows = [
        {"row": 100 * k + i, "language": code, "group": str(i), "nll": float(hard[i]), "chars": 3}
        for k, code in enumerate(("id", "th", "vi"))
        for i in range(100 - k)
    ]
    figure = FIGURES["nll_per_char"]
    together = {code: own.estimate() for code, own in sampled(figure, rows, 0).items()}
    apart = sampled(figure, [r | {"group": str(r["row"])} for r in rows], 0)["mean"].estimate()
    widths = {code: own.high - own.low for code, own in together.items()}
    assert widths["mean"] == pytest.approx(widths["id"], rel=0.15)
    assert apart.high - apart.low < 0.7 * widths["mean"]


@pytest.mark.parametrize(
    ("figure", "change", "settings", "note"),
    [
        ("nll_per_token", {"tokens": 9}, {}, "cut the same rows differently"),
        ("nll_per_char", {"chars": 9}, {}, "cut the same rows differently"),
        ("ece_tokens", {"token_bins": [[0, 9.0, 0.5, 1.0]]}, {}, "cut the same rows differently"),
        (
            "kl_to_teacher", {}, {"teacher_model_name_or_path": "b"},
            "have other values of teacher_model_name_or_path",
        ),
        (
            "chrf++", {}, {"max_completion_length": 64},
            "have other values of max_completion_length",
        ),
        ("kl_to_teacher", {"teacher_prompt_left_out": 7}, {}, "cut prompts differently"),
    ],
)  # fmt: skip
def test_figures_of_something_else_are_not_compared(
    figure: str, change: dict[str, Any], settings: dict[str, Any], note: str
) -> None:
    """Another tokenizer's tokens, another teacher, generations of another length."""
    more = {"tokens": 5, "kl": 1.0, "taught": 5.0, "token_bins": [[0, 5.0, 0.5, 1.0]]}
    more["chrf"] = [4, 4, 2] * 8
    rows = [row | more for row in rows_of(0)]
    old, new = result("old", rows), result("new", [row | change for row in rows])
    old.settings = {"teacher_model_name_or_path": "a", "max_completion_length": 128}
    new.settings = old.settings | settings
    comparison = compare([old, new])
    (told,) = comparison.notes
    assert note in told and told.endswith(f"no differences of {FIGURES[figure].title}")
    for line in comparison.of("t", "mean"):
        assert math.isnan(line.differences[1].value) == (line.figure == figure)


def test_runs_that_read_other_prompts_are_not_compared() -> None:
    """One prompt cut by one run alone: no figure has a difference, and one note says so."""
    rows = [row | {"tokens": 5} for row in rows_of(0)]
    cut = [row | {"prompt_left_out": 3 * (row["row"] == 0)} for row in rows]
    comparison = compare([result("old", rows), result("new", cut)])
    assert comparison.notes == [
        "t: new and old cut prompts differently (a larger max_prompt_length cuts none): "
        "no differences of NLL / char, NLL / token"
    ]
    assert all(math.isnan(line.differences[1].value) for line in comparison.lines)
    page = render(comparison)
    assert "new: 1 of 200 prompts were cut to max_prompt_length (vi 1/100)" in page


def test_other_rows_are_not_compared() -> None:
    """Of another number of generated rows, say, or a language that one could not judge."""
    rows = rows_of(0)
    fewer = [{k: v for k, v in row.items() if k != "nll" or row["row"]} for row in rows]
    comparison = compare([result("old", rows), result("new", fewer)])
    assert comparison.notes == [
        "t: new and old measured it over other rows (199 and 200): no differences of NLL / char"
    ]
    assert all(math.isnan(line.differences[1].value) for line in comparison.lines)
    thai = [row for row in rows if row["language"] == "th"]
    (note,) = compare([result("old", rows), result("new", thai, sha256="other")]).notes
    assert note.endswith("no paired differences, and means over other languages (old has vi alone)")


def test_one_row_has_no_interval() -> None:
    """All its resamples are the same, which is not certainty; the page shows the value."""
    rows = rows_of(0, count=1)
    comparison = compare([result("old", rows), result("new", rows_of(1, count=1))])
    (line,) = comparison.lines
    for own in (*line.values, line.differences[1]):
        assert math.isfinite(own.value) and math.isnan(own.low) and math.isnan(own.high)
    assert line.verdicts == ["", ""] and "nan" not in render(comparison).lower()
