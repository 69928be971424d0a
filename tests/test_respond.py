"""`dudi respond`: what the teacher writes is a dataset, however it was shared or killed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

from dudi import cli, parts, respond
from dudi.config import DuDiConfig
from dudi.data import load_data
from dudi.demo_data import data_path, translation_rows
from dudi.parts import Asked
from dudi.respond import Sampling, as_example, ask, batches_of, kept
from dudi.rows import Reader, TeacherPrompts
from dudi.verbalize import ContextVerbalizer

TEACHER = str(data_path("teacher"))
ROWS = translation_rows("test")[:6]


def write_data(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(folder: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> list[str]:
    settings = {
        "model_name_or_path": TEACHER,
        "teacher_model_name_or_path": TEACHER,
        "dataset_name": write_data(folder / "data.jsonl", ROWS if rows is None else rows),
        "output": folder / "out.jsonl",
        "output_dir": folder / "unused",
        "context_verbalizer": False,
        "max_completion_length": 24,
        "sampling_temperature": 0.0,
        "batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
    }
    given = settings | options
    return ["respond", *(word for n, v in given.items() for word in (f"--{n}", str(v)))]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@torch.no_grad()
def greedy(model: Any, ids: list[int], most: int) -> list[int]:
    """One token at a time, without a cache."""
    found: list[int] = []
    while len(found) < most and found[-1:] != [1]:
        found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


def test_what_the_teacher_writes_is_a_dataset_to_train_on(tmp_path: Path) -> None:
    assert cli.main(words(tmp_path)) == 0
    found = lines(tmp_path / "out.jsonl")
    tokenizer = respond.load_tokenizer(TEACHER, "x")
    model = respond.load_model(TEACHER, {"dtype": torch.float32}, "x").eval()
    by_row = {r["provenance"]["row"]: r for r in found}
    for i, row in enumerate(ROWS):
        ids = tokenizer(
            tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        written = greedy(model, ids, 24)
        if written[-1] != tokenizer.eos_token_id:
            assert i not in by_row  # it did not end, and y+ would say that it does
            continue
        got = by_row[i]
        assert got["completion"] == [
            {
                "role": "assistant",
                "content": tokenizer.decode(written, skip_special_tokens=True).strip(),
            }
        ]
        assert got["prompt"] == row["prompt"] and got["pivot_prompt"] == row["pivot_prompt"]
        assert got["provenance"]["tokens"] == len(written)
    assert len(found) >= 3
    sidecar = json.loads((tmp_path / "out.provenance.json").read_text())
    counts = sidecar["counts"]
    assert counts["responses"] + counts.get("truncated responses", 0) == len(ROWS)
    assert sidecar["settings"]["teacher"] == TEACHER == found[0]["provenance"]["teacher"]
    assert not (tmp_path / "out.jsonl.parts").exists()
    assert len(load_data(tmp_path / "out.jsonl")) == len(found)
    options = {
        "model_name_or_path": TEACHER, "dataset_name": tmp_path / "out.jsonl", "max_steps": 1,
        "output_dir": tmp_path / "run", "off_policy_weight": 0, "on_policy_weight": 0,
        "preference_weight": 0, "ce_weight": 1, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    assert cli.main(["train", *(w for n, v in options.items() for w in (f"--{n}", str(v)))]) == 0


def test_bad_rows_are_left_out_if_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROWS[0], {**ROWS[1], "prompt": [{"role": None, "content": "x"}]}]
    assert cli.main(words(tmp_path, rows)) == 2
    assert "row 1 of the train dataset: prompt must be a list of messages" in told(capsys)
    assert cli.main(words(tmp_path, rows, bad_rows="skip")) == 0
    sidecar = json.loads((tmp_path / "out.provenance.json").read_text())
    assert sidecar["counts"]["bad rows"] == 1 and sidecar["bad_rows"][0]["row"] == 1
    (tmp_path / "out.jsonl").unlink()
    assert cli.main(words(tmp_path, rows[1:], bad_rows="skip")) == 2
    assert "no prompt of the train dataset is left: 0 are overlong, 1 bad; the fi" in told(capsys)
    assert cli.main(words(tmp_path, [{"messages": ["hello"]}])) == 2
    assert "row 0 of the train dataset: prompt must be a list of messages" in told(capsys)


def test_shards_kills_and_one_process_write_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "samples": 2,
        "sampling_temperature": 1.5,
        "keep_truncated": True,
        "seed": 7,
    }
    options["max_completion_length"] = 8
    for name in ("one", "more"):
        (tmp_path / name).mkdir()
    assert cli.main(words(tmp_path / "one", **options)) == 0
    more = words(tmp_path / "more", **options)
    assert cli.main([*more, "--shard", "2/2"]) == 0
    assert "2 of 3 batches are left to the others" in capsys.readouterr().out
    assert not (tmp_path / "more" / "out.jsonl").exists()
    write, calls = respond.Writer.__call__, []

    def dies(self: Any, batch: Any, index: int) -> Any:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, batch, index)

    monkeypatch.setattr(respond.Writer, "__call__", dies)
    assert cli.main([*more, "--shard", "1/2"]) == 130
    assert cli.main(more) == 0
    assert calls == [0, 2, 2]  # batch 1 was the other shard's, batch 0 was done
    one, other = ((tmp_path / name / "out.jsonl").read_text() for name in ("one", "more"))
    assert one == other and len(one.splitlines()) > len(ROWS)
    assert cli.main(more) == 2
    assert "output must be a new file" in told(capsys)


def test_equal_prompts_are_answered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[int] = []
    write = respond.Writer.__call__

    def noted(self: Any, batch: Any, index: int) -> Any:
        written.extend(a.row for a in batch)
        return write(self, batch, index)

    monkeypatch.setattr(respond.Writer, "__call__", noted)
    rows = [*ROWS[:3], *ROWS[:3], {**ROWS[0], "language": "xx"}]
    assert cli.main(words(tmp_path, rows, keep_truncated=True)) == 0
    assert sorted(written) == [0, 1, 2, 6]  # another language is another row
    assert "3 equal prompts" in capsys.readouterr().out


def test_which_samples_are_kept() -> None:
    sampling = Sampling(5, 1.0, 1.0, 0, 8, 0, False)
    texts = [(" a", "eos"), ("a ", "eos"), ("  ", "eos"), ("b", "length"), ("c", "eos")]
    answers = [{"text": text, "finish_reason": reason} for text, reason in texts]
    counts: Counter = Counter()
    found = [(n, text) for n, text, _ in kept(answers, True, sampling, counts)]
    assert found == [(0, "a"), (4, "c")]
    assert counts == {"equal responses": 1, "empty responses": 1, "truncated responses": 1}
    found = [(n, text) for n, text, _ in kept(answers, False, sampling, Counter())]
    assert found == [(0, " a"), (1, "a "), (4, "c")]  # a plain text goes on where the prompt ends


def test_rows_without_a_response_and_conversations() -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert as_example({"messages": [user, answer]}) == (
        {"prompt": [user], "completion": [answer]}, True
    )  # fmt: skip
    whole, answered = as_example({"messages": [user], "language": "th"})
    assert whole["prompt"] == [user] and whole["language"] == "th" and not answered
    assert as_example({"prompt": "p"}).row == {"prompt": "p", "completion": "..."}
    assert as_example({"prompt": "p", "completion": "c"}).answered


def test_the_teacher_reads_the_verbalized_prompt() -> None:
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "completion"} for row in ROWS])
    tokenizer = tiny.tokenizer()
    config = DuDiConfig(output_dir="x", report_to="none", use_cpu=True)
    verbalizer = respond.verbalizer_of(config, data)
    assert isinstance(verbalizer, ContextVerbalizer)
    asked, _ = ask(data, TeacherPrompts(Reader(tokenizer), verbalizer))
    for a in asked:
        text = tokenizer.decode(a.ids)
        assert ROWS[a.row]["pivot_prompt"] in text and "..." not in text
    config.verbalizer_templates = dict.fromkeys(verbalizer.languages, "{{ completion }}")
    with pytest.raises(ValueError, match="shows completion, which row 0 of the train dataset"):
        respond.verbalizer_of(config, data)


def test_batches_start_with_the_longest_and_lose_nothing() -> None:
    asked = [Asked(i, [0] * (1 + i * 7 % 5)) for i in range(11)]
    found = batches_of(asked, 3)
    assert sorted(a for batch in found for a in batch) == asked
    lengths = [len(a.ids) for batch in found for a in batch]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text(""), "does not hold the responses of its batch"),
        (lambda path: path.write_text('{"row": '), "can't be read"),
        (lambda path: path.write_text('{"row": 99, "text": "x"}\n'), "does not hold the responses"),
    ],
)
def test_a_damaged_part_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    options = words(tmp_path, ROWS[:4])
    assert cli.main([*options, "--shard", "1/2"]) == 0
    part = parts.part_path(tmp_path / "out.jsonl.parts", 0)
    damage(part)
    assert cli.main(options) == 2
    error = told(capsys)
    assert message in error and str(part) in error
    assert not (tmp_path / "out.jsonl").exists()
    part.unlink()
    assert cli.main(options) == 0


def test_other_settings_do_not_go_on_with_these_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words(tmp_path, ROWS[:4]), "--shard", "1/2"]) == 0
    assert cli.main(words(tmp_path, ROWS[:4], seed=3, max_completion_length=9)) == 2
    error = told(capsys)
    assert "max_tokens was 24, is 9" in error and "seed was 42, is 3" in error
    assert cli.main(words(tmp_path, ROWS[:3])) == 2
    assert "prompts was" in told(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "out.csv"}, "output must be a new file that ends in .jsonl, got 'out.csv'"),
        ({"shard": "3/2"}, "shard must be i/n with 1 <= i <= n, such as 2/4, got '3/2'"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 2}, "samples must be 1 at sampling_temperature 0"),
        ({"sampling_top_p": 0}, "sampling_top_p must be in (0, 1]"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"teacher_model_name_or_path": "null"}, "teacher_model_name_or_path must be given"),
        ({"max_completion_length": "null", "preference_weight": 0, "on_policy_weight": 0},
         "max_completion_length must be a number"),
        ({"max_completion_length": 1}, "no response is left to train on (6 rows"),
    ],
)  # fmt: skip
def test_refusals(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    message: str,
) -> None:
    assert cli.main(words(tmp_path, **options)) == 2
    assert message in told(capsys)
    assert not (tmp_path / "out.jsonl").exists()


def test_output_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["respond"]) == 2
    assert "--output must be given" in told(capsys)
