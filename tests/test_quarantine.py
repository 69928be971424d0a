"""Rows whose teacher's answer is lost: fatal, or left out, named and counted, whatever lost it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_served
import tiny
import torch
from datasets import Dataset
from test_served import K, bucketed
from test_teacher_cache import ROWS, a_teacher, cached, flip, trainer
from test_teaching import GIVEN, kl, log_probs, step

from dudi import quarantine, served
from dudi.caching import asked_by, source_of, write_cache
from dudi.callbacks import read_jsonl
from dudi.served import Client, Endpoint, ServedTeacher, TeacherServerError
from dudi.teacher_cache import LEFT_OUT, Entry
from dudi.trainer import DuDiTrainer

SKIP: dict[str, Any] = {"bad_rows": "skip"}
server = test_served.server  # the fixture
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def bad_rows(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "bad_rows.jsonl")


# ---- a damaged cache -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a shard for each row."""
    folder = tmp_path_factory.mktemp("whole")
    cached(trainer(folder / "live", a_teacher()), folder / "cache", shard_bytes=1)
    return folder / "cache"


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """Two of its shards are no more what they were: one bit, half of the file."""
    folder = Path(shutil.copytree(whole, tmp_path / "cache"))
    first, second, *_ = sorted(folder.glob("shard-*"))
    flip(first, -1)
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    yield folder


def damage(folder: Path, **settings: Any) -> DuDiTrainer:
    with pytest.warns(UserWarning) as told:
        made = trainer(folder, None, **SKIP, **settings)
    lost, left_out = ([w for w in told if text in str(w.message)] for text in ("lost", "left out"))
    assert len(lost) == 2 and len(left_out) == 1
    return made


@pytest.mark.filterwarnings("ignore:what is in it is lost", "ignore:.*are left out")
def test_rows_of_a_damaged_shard_are_left_out_and_named(damaged: Path, tmp_path: Path) -> None:
    """The run is that of the other rows alone, and a resumed one that of one never stopped."""
    names = [path.name for path in sorted(damaged.glob("shard-*"))[:2]]
    with pytest.raises(ValueError, match=f"{names[0]} is corrupt"):
        trainer(tmp_path / "run", None, teacher_cache=str(damaged))
    run = damage(tmp_path / "run", teacher_cache=str(damaged), **SAVING)
    run.train()
    records = bad_rows(tmp_path / "run")
    assert len(records) == 2 == run.data_counts["train"]["bad_rows"]
    assert run.data_counts["train"]["rows"] == len(run.train_dataset) == ROWS - 2
    assert all(names[0] in r["reason"] and r["split"] == "train" for r in records)
    assert {line["bad_rows"] for line in tiny.logged(tmp_path / "run")} == {2.0}

    rest = [i for i in range(ROWS) if i not in {r["row"] for r in records}]
    other = DuDiTrainer(
        tiny.model(0),
        args=tiny.config(tmp_path / "rest", **GIVEN, teacher_cache=str(damaged), **SKIP),
        train_dataset=tiny.rows(ROWS).select(rest),
        processing_class=tiny.tokenizer(),
    )
    other.train()
    losses = [[r["loss"] for r in tiny.logged(tmp_path / n)] for n in ("run", "rest")]
    assert losses[0] == losses[1]

    want = tiny.logged(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    damage(tmp_path / "run", teacher_cache=str(damaged), **SAVING).train(
        resume_from_checkpoint=True
    )
    assert tiny.logged(tmp_path / "run") == want and bad_rows(tmp_path / "run") == records


def test_the_command_again_repairs_a_damaged_cache(damaged: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted(damaged.glob("shard-*"))[:2]]
    (head,) = damaged.glob("head-*")
    run = damage(tmp_path / "run", teacher_cache=str(damaged), **SAVING, max_steps=1)
    run.train()
    flip(head, 3000)
    live = trainer(tmp_path / "live", a_teacher())
    with pytest.warns(UserWarning, match=r"is damaged: kept as .*\.damaged, made again"):
        assert cached(live, damaged, shard_bytes=1) == (2, ROWS - 2)
    kept = {path.name for path in damaged.glob("*.damaged")}
    assert kept == {f"{name}.damaged" for name in (*names, head.name)}
    assert cached(live, damaged) == (0, ROWS)
    again = trainer(tmp_path / "run", None, teacher_cache=str(damaged), **SAVING, max_steps=1)
    with pytest.raises(ValueError, match=f"training data had {ROWS - 2} rows, has {ROWS}"):
        again.check_resumable()


def test_a_head_that_is_damaged_is_fatal(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "cache"))
    (head,) = folder.glob("head-*")
    flip(head, -1)
    with pytest.raises(ValueError, match=f"{head.name} is corrupt"):
        trainer(tmp_path / "run", None, teacher_cache=str(folder), **SKIP)


def test_what_was_never_asked_is_no_damage(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks what is asked about \d+ of 12 rows"):
        trainer(tmp_path / "run", None, teacher_cache=str(whole), max_completion_length=5, **SKIP)


# ---- whose answers they are ----------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_teacher_wherever_it_lies(whole: Path, tmp_path: Path) -> None:
    settings = SAVING | {"max_steps": 2}
    trainer(tmp_path / "run", None, teacher_cache=str(whole), **settings).train()
    moved = shutil.copytree(whole, tmp_path / "moved")
    trainer(tmp_path / "run", None, teacher_cache=str(moved), **settings).check_resumable()
    cached(trainer(tmp_path / "live", tiny.model(2)), tmp_path / "other")
    for teacher, more in ((None, {"teacher_cache": str(tmp_path / "other")}), (a_teacher(), {})):
        with pytest.raises(ValueError, match=r"the teacher was 2 hidden .*, is "):
            trainer(tmp_path / "run", teacher, **settings, **more).check_resumable()


def test_a_live_teacher_is_known_by_its_weights(tmp_path: Path) -> None:
    settings = SAVING | {"max_steps": 1}
    trainer(tmp_path / "run", a_teacher(), **settings).train()
    trainer(tmp_path / "run", a_teacher(), **settings).check_resumable()
    with pytest.raises(ValueError, match=r"the teacher was live .*, is live"):
        trainer(tmp_path / "run", tiny.model(2), **settings).check_resumable()


# ---- a server that answers rubbish ---------------------------------------------------------------


def is_bad(ids: list[int]) -> bool:
    return sum(ids) % 4 == 1  # not the sentence that is tried at the start


@pytest.fixture
def rubbish(monkeypatch: pytest.MonkeyPatch) -> None:
    """To some questions, always the same ones."""
    ask = Client.ask

    def asked(self: Client, method: str, path: str, body: Any = None) -> Any:
        if body is not None and is_bad(body["prompt"]):
            return {"choices": "rubbish"}
        return ask(self, method, path, body)

    monkeypatch.setattr(Client, "ask", asked)


def asking(folder: Path, url: str, **settings: Any) -> DuDiTrainer:
    return trainer(folder, None, teacher_url=url, served_top_k=K, **settings)


def test_responses_to_which_a_server_answers_rubbish(
    server: str,
    rubbish: None,
    tmp_path: Path,
) -> None:
    """The divergences are means over the others."""
    settings: dict[str, Any] = {"on_policy_weight": 0.7, "ce_weight": 0.1, "num_generations": 2}
    wanted = r"step 1, dataset rows \[.*\]: .* must answer choices.*There is no checkpoint yet"
    with pytest.raises(TeacherServerError, match=wanted):
        asking(tmp_path / "error", server, **settings).train()
    run = asking(tmp_path / "run", server, **settings, **SKIP)
    batch, output = step(run)
    seen, segments = batch.lesson.seen, batch.student.segment_ids
    lost = torch.zeros(len(segments), dtype=torch.bool)
    for ids, mask, rows in (one for g in seen.groups for one in zip(*g, strict=True)):
        if is_bad(ids[mask.bool()].tolist()):
            response = ids[1:][rows[:-1]]
            for s in segments.unique():
                lost |= (segments == s) & torch.equal(seen.targets[segments == s], response)
    assert 0 < lost.sum() < len(lost)
    assert {(r["row"], r["response"]) for r in batch.lost} == {
        (batch.rows[int(s) // 3], "sample" if s % 3 else "given") for s in segments[lost].unique()
    }
    p = log_probs(a_teacher(), seen).exp()
    p, q = bucketed(p, log_probs(run.model, batch.student).exp())
    given = segments % 3 == 0
    for mean, every, side in (
        (output.off_policy_loss, kl(p, q), given),
        (output.on_policy_loss, kl(q, p), ~given),
    ):
        assert mean.item() == pytest.approx(every[side & ~lost].mean().item(), rel=1e-5)
    want = output.off_policy_loss + 0.7 * output.on_policy_loss + 0.1 * output.ce_loss
    assert output.loss.item() == pytest.approx(want.item(), rel=1e-6)


def test_a_run_with_rubbish_goes_on_exactly(
    server: str,
    rubbish: None,
    tmp_path: Path,
) -> None:
    settings = SAVING | SKIP | {"on_policy_weight": 1.0, "max_steps": 3}
    asking(tmp_path, server, **settings).train()
    want, records = tiny.logged(tmp_path), bad_rows(tmp_path)
    assert {r["step"] for r in records} >= {1, 2}
    assert want[-1]["bad_rows"] == len(records)
    for number in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{number}")
    asking(tmp_path, server, **settings).train(resume_from_checkpoint=True)
    assert tiny.logged(tmp_path) == want and bad_rows(tmp_path) == records


def test_an_evaluation_tells_what_was_lost(
    server: str,
    rubbish: None,
    tmp_path: Path,
) -> None:
    run = asking(tmp_path, server, **SKIP)
    with pytest.warns(UserWarning, match=r"\d of \d+ responses are left out: .* must answer"):
        assert run.evaluate(tiny.rows(4 * ROWS, "test"))["eval_kl_to_teacher"] > 0


def test_a_server_of_nothing_but_rubbish_ends_the_run(
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = ServedTeacher(Endpoint(server, None, K), None, tiny.tokenizer(), skip_bad=True)
    monkeypatch.setattr(Client, "ask", lambda *args, **kwargs: {"choices": []})
    asked = [Entry([3, 4], [5])] * (served.LOST_SEEN // 2)
    assert all(isinstance(answer, str) for answer in teacher.answers(asked))
    with pytest.raises(TeacherServerError, match="no usable answer to 64 of 64 requests; the la"):
        list(teacher.answers(asked))


def test_a_cache_of_a_server_s_answers_lists_what_it_lacks(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: Any,
) -> None:
    folder, run = tmp_path / "cache", tmp_path / "run"
    live = asking(tmp_path / "live", server, **SKIP)
    source, asked = source_of(live, "topk", K), asked_by(live)
    request.getfixturevalue("rubbish")
    with pytest.warns(UserWarning, match="have no usable answer and are left out"):
        made, _ = write_cache(folder, source, live.bridge.tokenizer, asked)
    lost = len(read_jsonl(folder / LEFT_OUT))
    assert lost > 0 and made + lost == ROWS
    with pytest.raises(ValueError, match=f"about {lost} of {ROWS} rows .*the teacher's answer: "):
        trainer(run, None, teacher_cache=str(folder))
    with pytest.warns(UserWarning, match=f"{lost} of {ROWS} rows of the train dataset are left"):
        known = trainer(run, None, teacher_cache=str(folder), **SKIP)
    assert len(known.train_dataset) == made
    monkeypatch.undo()
    assert write_cache(folder, source, live.bridge.tokenizer, asked) == (lost, made)
    assert json.loads((folder / LEFT_OUT).read_text() or "[]") == []
    assert len(trainer(run, None, teacher_cache=str(folder)).train_dataset) == ROWS


# ---- ranks ---------------------------------------------------------------------------------------


def test_ranks_with_other_rows_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk of one machine that is damaged."""
    monkeypatch.setattr(quarantine, "gather_object", lambda own: [*own, (ROWS - 1, "{}")])
    with pytest.raises(ValueError, match="the same rows, they have 12, 11: a file or a cache is"):
        trainer(tmp_path, a_teacher())


def test_a_dataset_that_is_evaluated_again_is_counted_once(tmp_path: Path) -> None:
    run = DuDiTrainer(
        tiny.model(0), tiny.model(1), tiny.config(tmp_path, max_steps=1, **SKIP), tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    rows = tiny.rows(3, "test").to_list()
    rows[1]["completion"] = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out"):
            run.evaluate(Dataset.from_list(rows))
    (record,) = run.quarantine.of_data
    assert (record["split"], record["row"]) == ("eval", 1)
