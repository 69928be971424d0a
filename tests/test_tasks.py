"""Task files: what they mean, what is wrong with them, and what language a text is in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dudi.demo_data import ui_strings
from dudi.evaluation import builtin_tasks, fidelity, load_task
from dudi.evaluation.fidelity import Judge
from dudi.evaluation.items import items_hash, task_items
from dudi.evaluation.sources import Absent
from dudi.evaluation.task import Task


def written(folder: Path, content: Any, rows: Sequence[Any] | None = None) -> Path:
    lines = rows if rows is not None else [{"q": "What?", "a": "That.", "none": None}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), "utf-8")
    path = folder / "task.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), "utf-8")
    return path


BASE = {"name": "t", "source": {"file": "rows.jsonl"}, "prompt": "{{ q }}", "completion": "{{ a }}"}


def test_built_in_tasks() -> None:
    assert {"translation", "translation-choice", "thai-mmlu", "vietnamese-exams", "udhr",
            "mediawiki"} <= set(builtin_tasks())  # fmt: skip
    for name in builtin_tasks():
        task = load_task(name)
        assert task.name == name and task.about
        if task.source.builtin not in ("ui_strings", "ui_choices"):
            with pytest.raises(Absent, match=r"dudi eval-data"):
                task_items(task, data_dir="nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name: String should match pattern .*, got 'a/b'"),
        ({"source": {}}, "source: must have one of file, dataset and builtin, got none"),
        ({"source": {"builtin": "x"}}, "source.builtin: Input should be 'ui_strings'.*, got 'x'"),
        (
            {"source": {"builtin": "ui_strings", "split": "dev"}},
            "split must be one of train.*'dev'",
        ),
        ({"prompt": "{{ q"}, r"prompt: must be valid jinja2: line 1: .*got '\{\{ q'"),
        ({"completion": None}, "must have one of completion, choices and examples, got none"),
        ({"choices": ["a", "b"], "answer": "0"}, "got completion and choices"),
        ({"completion": None, "choices": "a"}, "go together, answer is missing"),
        ({"completion": None, "choices": ["a"], "answer": "0"}, "two choices at least, got 1"),
        ({"completion": None, "choices": "a +", "answer": "0"}, "choices: must be an expression"),
        ({"metrics": ["accuracy"]}, "with a completion must be of nll, .*, got 'accuracy'"),
        ({"metrics": ["bleu"]}, "metrics.0: Input should be 'nll'.*, got 'bleu'"),
        ({"rows": {"limit": 0}}, "rows.limit: .*greater than or equal to 1, got 0"),
        ({"colour": 1}, "colour: Extra inputs are not permitted, got 1"),
        ("- a", "must be a mapping, got list"),
        ("a: [", "must be YAML: "),
    ],
)
def test_bad_tasks_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = written(tmp_path, change if isinstance(change, str) else BASE | change)
    with pytest.raises(ValueError, match=message) as caught:
        load_task(path)
    assert str(caught.value).startswith(f"task {path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "{{ z }}"}, "prompt uses an unknown field: 'z' is undefined; the row has a,"),
        ({"prompt": "{{ q / 2 }}"}, "prompt failed: TypeError"),
        ({"prompt": "{{ q.__class__.__mro__ }}"}, "prompt failed: SecurityError"),
        ({"prompt": "{{ none }}"}, "prompt failed: ValueError: a field that it writes is null"),
        ({"completion": " "}, "completion must not be empty, got ' '"),
        ({"completion": None, "choices": "q", "answer": "0"}, "list of texts, got 'What\\?'"),
        ({"completion": None, "choices": "z", "answer": "0"}, "choices 'z' is not in the row"),
        ({"completion": None, "choices": ["a", "b"], "answer": "2"}, "index below 2 .*, got 2"),
        (
            {"completion": None, "choices": ["a", "a"], "answer": "'a'"},
            "text of one choice, got 'a'",
        ),
        ({"completion": None, "examples": True}, "must have prompt and completion, or messages"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: Any, message: str) -> None:
    task = load_task(written(tmp_path, BASE | change))
    with pytest.raises(ValueError, match=f"task t, row 0: .*{message}"):
        task_items(task)


def test_a_null_language_is_none(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b", "l": code} for code in ("th", None)]
    items = task_items(load_task(written(tmp_path, BASE | {"language": "{{ l }}"}, rows)))
    assert [item.language for item in items] == ["th", "all"]


def test_rows_are_chosen_by_language_and_seed(tmp_path: Path) -> None:
    rows = [{"q": f"{i}?", "a": "x", "l": "th" if i % 3 else "tl"} for i in range(30)]
    base = BASE | {"language": "{{ l }}"}
    whole = task_items(load_task(written(tmp_path, base, rows)))
    assert {item.language for item in whole} == {"th", "fil"} and len(whole) == 30  # tl is fil
    first = task_items(load_task(written(tmp_path, base | {"rows": {"limit": 4}}, rows)))
    assert [item.row for item in first] == [0, 1, 2, 3, 4, 5, 6, 9]
    drawn = [
        task_items(load_task(written(tmp_path, base | {"rows": {"limit": 4, "seed": seed}}, rows)))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 8
    assert items_hash(drawn[0]) == items_hash(drawn[1]) != items_hash(drawn[2])
    assert {item.language for item in task_items(load_task(tmp_path / "task.yaml"), ["tl"])} == {
        "fil"
    }
    with pytest.raises(Absent, match="no rows in km"):
        task_items(load_task(tmp_path / "task.yaml"), ["km"])


def test_translation_choices() -> None:
    """Four different texts of the target language, the reference among them, from its own split."""
    items = task_items(load_task("translation-choice"), ["lo"])
    there = {row["lo"] for row in ui_strings()}
    for item in items:
        assert len(set(item.choices)) == 4 and set(item.choices) <= there
    places = [item.answer for item in items]
    assert min(places.count(i) for i in range(4)) > len(places) / 8  # not always the first
    by_row = {item.row: item.completion for item in task_items(load_task("translation"), ["lo"])}
    assert all(by_row[item.row] == item.choices[item.answer] for item in items)


def test_conversations_are_read_as_training_reads_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Halo"}]
    rows = [{"messages": turns, "language": "id"}, {"messages": turns, "language": None}]
    task = {"name": "t", "source": {"file": "rows.jsonl"}, "examples": True}
    one, other = task_items(load_task(written(tmp_path, task, rows)))
    assert (one.prompt, one.completion, one.language, other.language) == ("Hi", "Halo", "id", "all")
    assert isinstance(load_task(tmp_path / "task.yaml"), Task)


def test_the_task_of_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    row = {"lang": "th", "question": "1 + 1?", "options": ["2", "3", "4", "5"], "index": 0}
    path = written(tmp_path, source, [])
    (tmp_path / "exam.jsonl").write_text(json.dumps(row | {"passage": "p"}) + "\n", "utf-8")
    (item,) = task_items(load_task(path))
    assert item.prompt.splitlines()[:2] == ["1 + 1?", "A. 2"]
    assert (item.choices, item.answer, item.group) == (("A", "B", "C", "D"), 0, "p")


TEXTS = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat yang sama.",
    "ms": "Semua manusia dilahirkan bebas dan sama rata dari segi kemuliaan.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    "fil": "Ang lahat ng tao'y isinilang na malaya at pantay-pantay.",
    "jv": "Saben uwong kalairake kanthi mardika lan darbe martabat kang padha.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "lo": "ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ",
    "km": "មនុស្សទាំងអស់កើតមកមានសេរីភាព",
    "my": "လူတိုင်းသည် တူညီလွတ်လပ်သော",
    "ta": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே",
}
ALIKE = {"id": {"id", "ms"}, "ms": {"id", "ms"}, "su": {"jv"}}


@pytest.mark.parametrize("language", [*TEXTS, "su"])
def test_fidelity(language: str) -> None:
    judge = Judge(language)
    assert judge.reason == ""
    faithful = {code for code, text in TEXTS.items() if judge.faithful(text)}
    assert faithful == ALIKE.get(language, {language})
    assert not judge.faithful("") and not judge.faithful("100 %") and not judge.counts("100 %")


def test_half_a_text_in_another_script() -> None:
    judge = Judge("th")
    assert judge.faithful("เปิด Wi-Fi ไว้เสมอ") and not judge.faithful("Turn Wi-Fi on เสมอ please")


def test_languages_that_cannot_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Judge("xx").reason == "xx is not among the languages of py3langid"
    monkeypatch.setattr(fidelity, "whole_identifier", lambda: None)
    assert "vi needs py3langid, which is not installed" in Judge("vi").reason
    assert Judge("th").reason == ""  # its script is enough
