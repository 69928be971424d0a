"""Every command and program of docs/guides/, run at miniature size, in the order of the page.

Blocks of sh, python and yaml are taken as a reader takes them: a yaml block is saved under the name
in its first line, `dudi ...` runs the command line, all else runs in bash. The models that a guide
names lie in the working folder, tiny; SMALLER has what else is cut down. Text blocks are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

from dudi.cli import main
from dudi.miniature.data import few_rows, write_rows

GUIDES = sorted((Path(__file__).parents[1] / "docs" / "guides").glob("*.md"))
STUDENT, TEACHER = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALLER = {
    "max_steps: 1000": "max_steps: 2\nreport_to: none\nper_device_eval_batch_size: 64",
    "max_steps: 200": "max_steps: 2\nreport_to: none\nper_device_eval_batch_size: 64",
    "per_device_train_batch_size: 16": "per_device_train_batch_size: 4",
    "save_steps: 100": "save_steps: 1",
    "eval_steps: 200": "eval_steps: 2",
    "max_completion_length: 128": "max_completion_length: 8",
    "--eval_steps 200": "--eval_steps 2",
    "steps: 1000": "steps: 2",
    "seeds: [0, 1, 2]": "seeds: [0]",
    "learning_rates: [1.0e-5, 3.0e-5]": "learning_rates: [1.0e-3]",
    "validation_rows: 500, validations: 5, generate_rows: 50": (
        "validation_rows: 4, validations: 1, generate_rows: 1"
    ),
    "limit: 20": "limit: 1",
    "--nproc_per_node 8": "--nproc_per_node 2",
}


class Block(NamedTuple):
    kind: str
    text: str


def blocks(guide: Path) -> list[Block]:
    text = guide.read_text(encoding="utf-8")
    for full, small in SMALLER.items():
        text = text.replace(full, small)
    return [Block(*found) for found in FENCE.findall(text)]


def commands(text: str) -> list[str]:
    """A block's commands: `dudi` ones by themselves, what stands between them together."""
    found: list[str] = [""]
    inside: str | None = None  # the end of a here-document
    for line in text.replace("\\\n", " ").splitlines():
        if inside is None and line.startswith("dudi "):
            found += [line, ""]
            continue
        found[-1] += line + "\n"
        begun = re.search(r"<<'(\w+)'", line)
        if begun:
            inside = begun[1]
        elif line == inside:
            inside = None
    return [command for command in found if command.strip()]


def run_command(command: str) -> None:
    if command.startswith("dudi "):
        words = [w for w in shlex.split(command, comments=True)[1:]]
        assert main(words) == 0, command
        return
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(GUIDES[0].parents[2]),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def save(text: str) -> None:
    name = re.match(r"# (\S+\.yaml)\n", text)
    if name:  # a fragment has none
        Path(name[1]).write_text(text, encoding="utf-8")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny models where the guides' are, and rows where a page has none."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate((STUDENT, TEACHER)):
        tiny.model(seed, width=32 + 16 * seed).save_pretrained(name)
        tiny.tokenizer().save_pretrained(name)
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", few_rows(split))
    return tmp_path


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_does_what_it_says(guide: Path, workplace: Path) -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    for kind, text in blocks(guide):
        match kind:
            case "sh":
                for command in commands(text):
                    run_command(command)
            case "python":
                exec(compile(text, f"<{guide.name}>", "exec"), namespace)
            case "yaml":
                save(text)
            case _:
                assert kind == "text", f"{guide.name} has a block of {kind}, which nothing runs"


def test_links_lead_somewhere() -> None:
    root = GUIDES[0].parents[2]
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
