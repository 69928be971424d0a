"""Training from a cached teacher: equal to the live one, whole after kills, no bad files read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_teaching import ALONE, GIVEN, kl, log_probs, step, teacher_tokenizer

from dudi import cli, teacher_cache
from dudi.caching import HiddenStates, LikeliestTokens, asked_by, write_cache
from dudi.callbacks import read_jsonl
from dudi.config import DuDiConfig
from dudi.teacher_cache import CachedStates, CachedTop, Entry
from dudi.trainer import DuDiTrainer

ROWS = 12
HERE = Path(__file__).parent
BF16_RTOL = 2e-3  # of a loss, from hidden states rounded to 8 bits


def trainer(
    folder: Path, teacher: Any, own: Any = None, rows: int = ROWS, **settings: Any
) -> DuDiTrainer:
    return DuDiTrainer(
        tiny.model(0),
        teacher,
        args=tiny.config(folder, **(GIVEN | settings)),
        train_dataset=tiny.rows(rows),
        processing_class=tiny.tokenizer(),
        teacher_processing_class=own,
    )


def cached(
    made: DuDiTrainer, folder: Path, top_k: int = 0, asked: Any = None, **options: Any
) -> tuple[int, int]:
    source = LikeliestTokens(made.teacher, top_k, tiny.VOCAB) if top_k else None
    return write_cache(
        folder,
        source or HiddenStates(made.teacher),
        made.bridge.tokenizer,
        asked_by(made) if asked is None else asked,
        **options,
    )


def a_teacher(own: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    return tiny.model(1, vocab=len(own) if own else tiny.VOCAB).to(dtype)


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        (True, {}),
        (False, {"teacher_skip_tokens": 2, "off_policy_divergence": "jsd"}),
        (False, {"confidence_gating": 0.5, "verbalized_share": 0.7, "ce_weight": 0.3}),
        (True, {"teacher_top_p": 0.8, "teacher_temperature": 0.7}),
    ],
)
def test_losses_and_gradients_equal_those_of_the_live_teacher(
    tmp_path: Path, other: bool, settings: dict[str, Any]
) -> None:
    compare(tmp_path, torch.float32, BF16_RTOL, teacher_tokenizer() if other else None, settings)


def test_a_teacher_in_bf16_loses_nothing(tmp_path: Path) -> None:
    compare(tmp_path, torch.bfloat16, 1e-5, None, {"confidence_gating": 0.5})


def compare(
    tmp_path: Path, dtype: torch.dtype, rtol: float, own: Any, settings: dict[str, Any]
) -> None:
    """One step from the live teacher, and from its cache."""
    live = trainer(tmp_path / "live", a_teacher(own, dtype), own, **settings)
    cached(live, tmp_path / "cache")
    known = trainer(tmp_path / "run", None, teacher_cache=str(tmp_path / "cache"), **settings)
    assert known.teacher.live is None
    results = []
    for made in (live, known):
        _, output = step(made)
        output.loss.backward()
        results.append((output, made.model.model.embed_tokens.weight.grad))
    (want, want_grad), (got, got_grad) = results
    assert got.off_policy_loss.item() == pytest.approx(want.off_policy_loss.item(), rel=rtol)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=rtol)
    assert (got_grad - want_grad).norm() <= 10 * rtol * want_grad.norm()


def test_states_are_those_of_each_response_rounded_once(tmp_path: Path) -> None:
    live = trainer(tmp_path / "live", a_teacher())
    cached(live, tmp_path / "cache", batch_size=5)
    store = CachedStates(tmp_path / "cache")
    for entry in asked_by(live)[:4]:
        ids = torch.tensor([[*entry.prompt, *entry.response]])
        states = live.teacher.model(ids).last_hidden_state[0, len(entry.prompt) - 1 : -1]
        (found,) = store.cache.read(entry, "hidden") or []
        assert found.dtype == torch.bfloat16
        assert (found.float() - states).norm() <= 3e-3 * states.norm()


def test_what_was_made_is_kept_and_the_rest_is_added(tmp_path: Path) -> None:
    live, folder = trainer(tmp_path / "live", a_teacher()), tmp_path / "cache"
    asked = asked_by(live)
    count = len({entry.key("") for entry in asked})
    half = cached(live, folder, asked=asked[: ROWS // 2])
    before = {path.name for path in folder.iterdir()}
    (folder / "shard-0123.tmp").write_bytes(b"half of a shar")  # as a kill leaves it
    assert cached(live, folder, shard_bytes=1) == (count - half[0], half[0])
    names = {path.name for path in folder.iterdir()}
    assert before < names and not any(name.endswith(".tmp") for name in names)
    assert len([n for n in names if n.startswith("shard-")]) == 1 + count - half[0]
    assert cached(live, folder) == (0, count)


KILLED = """
import os, sys
from pathlib import Path
import tiny, test_teacher_cache as t
from dudi import caching, shards
whole, left = shards.save_named, [4]
def dies(folder, prefix, tensors, header):
    left[0] -= 1
    if not left[0]:
        (folder / "shard-torn.tmp").write_bytes(b"torn")
        os.kill(os.getpid(), 9)
    return whole(folder, prefix, tensors, header)
shards.save_named = caching.save_named = dies
live = t.trainer(Path(sys.argv[1]) / "live", t.a_teacher())
t.cached(live, Path(sys.argv[1]) / "cache", shard_bytes=1)
"""


def test_a_killed_writer_leaves_whole_shards_to_go_on_from(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    live = trainer(tmp_path / "live", a_teacher())
    made, kept = cached(live, tmp_path / "cache")
    assert kept == 2 and made == ROWS - 2  # the head is written first
    trainer(tmp_path / "run", None, teacher_cache=str(tmp_path / "cache"))


# ---- likeliest tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"off_policy_divergence": "jsd", "teacher_skip_tokens": 2},
        {"ce_weight": 0.3, "preference_weight": 0.5, "num_generations": 2},
    ],
)
def test_all_tokens_are_the_live_teacher(tmp_path: Path, settings: dict[str, Any]) -> None:
    live = trainer(tmp_path / "live", a_teacher(), **settings)
    cached(live, tmp_path / "cache", top_k=tiny.VOCAB)
    known = trainer(tmp_path / "run", None, teacher_cache=str(tmp_path / "cache"), **settings)
    assert isinstance(known.teacher, CachedTop) and not list(known.teacher.parameters())
    results = []
    for made in (live, known):
        _, output = step(made)
        output.loss.backward()
        results.append((output, made.model.model.embed_tokens.weight.grad))
    (want, want_grad), (got, got_grad) = results
    for name in want._fields:
        a, b = getattr(want, name).double(), getattr(got, name).double()
        assert (a - b).norm() <= 2e-5 * a.norm() + 1e-7, name
    assert (got_grad - want_grad).norm() <= 1e-5 * want_grad.norm()


def test_few_tokens_are_classes_and_a_bucket(tmp_path: Path) -> None:
    live = trainer(tmp_path / "live", a_teacher())
    cached(live, tmp_path / "cache", top_k=5)
    known = trainer(tmp_path / "run", None, teacher_cache=str(tmp_path / "cache"))
    batch, output = step(known)
    p = log_probs(live.teacher, batch.lesson.seen).exp()
    q = log_probs(known.model, batch.student).exp()
    ids = p.topk(5).indices
    p, q = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, True)], 1) for x in (p, q))
    assert output.off_policy_loss.item() == pytest.approx(kl(p, q).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 2.0}, r"temperature must be 1.0 with the teacher in teacher_cache"),
        ({"teacher_temperature": 0.5}, "teacher_temperature must be 1 with"),
        ({"teacher_top_p": 0.9}, r"teacher_top_p must be 1.0 with"),
        ({"confidence_gating": 0.5}, r"confidence_gating must be 0.0 with"),
        ({"gradient_tolerance": 0.01}, r"gradient_tolerance must be 0.0 with"),
        ({"on_policy_weight": 1.0}, "on_policy_weight must be 0 and reference not 'teacher' with"),
        ({"lexicon": "x.tsv"}, "there must be no lexicon"),
    ],
)
def test_what_likeliest_tokens_can_not_do(
    made_topk: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "x.tsv").write_text("network\tjaringan\tid\n")
    if "lexicon" in settings:
        settings = {"lexicon": str(tmp_path / "x.tsv")}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", None, teacher_cache=str(made_topk), **settings)


@pytest.fixture(scope="module")
def made_topk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topk")
    cached(trainer(folder / "live", a_teacher()), folder / "cache", top_k=3)
    return folder / "cache"


# ---- beside a live teacher -----------------------------------------------------------------------


def test_samples_need_the_live_teacher_which_then_reads_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = trainer(tmp_path / "live", a_teacher(), on_policy_weight=1.0)
    cached(live, tmp_path / "cache")
    settings: dict[str, Any] = {
        "on_policy_weight": 1.0,
        "teacher_cache": str(tmp_path / "cache"),
    }
    with pytest.raises(ValueError, match=r"of given responses, not of samples: on_policy_weight=1"):
        trainer(tmp_path / "run", None, **settings)
    both = trainer(tmp_path / "run", a_teacher(), **settings)
    read: list[Entry] = []
    states_of = teacher_cache.states_of

    def noted(model: Any, asked: list[Entry], *more: Any) -> Any:
        read.extend(asked)
        return states_of(model, asked, *more)

    monkeypatch.setattr(teacher_cache, "states_of", noted)
    want, got = step(live)[1], step(both)[1]
    assert len(read) == both.args.per_device_train_batch_size
    assert got.on_policy_loss.item() == pytest.approx(want.on_policy_loss.item(), rel=1e-5)
    assert got.off_policy_loss.item() == pytest.approx(want.off_policy_loss.item(), rel=BF16_RTOL)
    with pytest.raises(ValueError, match="is not the live one: it was made with"):
        trainer(tmp_path / "run", tiny.model(2), **settings)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three shards."""
    folder = tmp_path_factory.mktemp("made")
    live = trainer(folder / "live", a_teacher())
    cached(live, folder / "cache", shard_bytes=1_000)
    assert len(list((folder / "cache").glob("shard-*"))) >= 3
    return folder / "cache"


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "cache")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("place", [20, -1])
@pytest.mark.parametrize("prefix", ["shard-", "head-"])
def test_a_flipped_bit_is_found_and_its_file_named(cache: Path, prefix: str, place: int) -> None:
    path = sorted(cache.glob(f"{prefix}*"))[-1]
    flip(path, place)
    with pytest.raises(ValueError, match=f"{path.name} is corrupt"):
        CachedStates(cache)


def test_a_torn_shard_is_found(cache: Path) -> None:
    path = sorted(cache.glob("shard-*"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name} is corrupt.*run `dudi cache-teacher` again"):
        CachedStates(cache)


def test_a_shard_of_another_teacher_is_named(cache: Path, tmp_path: Path) -> None:
    other = trainer(tmp_path / "live", tiny.model(2))
    cached(other, tmp_path / "other")
    (shard,) = (tmp_path / "other").glob("shard-*")
    shutil.copy(shard, cache)
    with pytest.raises(ValueError, match=f"{shard.name} does not belong here: its teacher is"):
        CachedStates(cache)
    with pytest.raises(ValueError, match=r"with another teacher: choose another folder"):
        cached(other, cache)


def test_a_changed_description_is_found(cache: Path) -> None:
    path = cache / "cache.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"scale": 2.0}))
    with pytest.raises(ValueError, match=r"cache.json is corrupt"):
        CachedStates(cache)
    path.write_text(json.dumps({"kind": "hidden"}))
    with pytest.raises(ValueError, match=r"cache.json is not what `dudi cache-teacher` writes"):
        CachedStates(cache)
    path.unlink()
    with pytest.raises(ValueError, match=r"there is no cache\.json"):
        CachedStates(cache)


@pytest.mark.parametrize(
    "change",
    [
        {"max_completion_length": 5},
        {"context_verbalizer": False},
        {"rows": ROWS + 1},
        {"confidence_gating": 0.5},  # the plain prompt is asked about too
    ],
)
def test_what_the_cache_lacks_is_told_before_training(
    cache: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"lacks what is asked about \d+ of \d+ rows of the tr"):
        trainer(tmp_path / "run", None, teacher_cache=str(cache), **change)


def test_what_is_asked_and_not_there_is_never_made_up(cache: Path) -> None:
    store = CachedStates(cache)
    packed = teacher_cache.pack([torch.tensor([5, 6])], [torch.tensor([7, 8, 9])], 0)
    with pytest.raises(ValueError, match="lacks 1 of the sequences"):
        store.hidden(packed)
    with pytest.raises(ValueError, match="has no body to run"):
        store(torch.tensor([[1, 2]]))


def test_keys_tell_prompts_responses_and_teachers_apart() -> None:
    asked = [Entry([1, 2], [3]), Entry([1], [2, 3]), Entry([1, 2], [4]), Entry([1, 2, 3], [])]
    keys = {entry.key(teacher) for entry in asked for teacher in ("a", "b")}
    assert len(keys) == 8


def test_identities_of_teachers() -> None:
    same, again = teacher_cache.teacher_identity(tiny.model(1)), tiny.model(1)
    assert teacher_cache.teacher_identity(again) == same
    assert teacher_cache.teacher_identity(tiny.model(1).bfloat16()) != same
    with torch.no_grad():
        again.model.embed_tokens.weight[7001, 3] += 1e-6  # one value of half a million
    assert teacher_cache.teacher_identity(again) != same


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dudi import shards

    live = trainer(tmp_path / "live", a_teacher())

    def full(tensors: Any, path: Path, header: Any) -> None:
        path.write_bytes(b"half")
        raise shards.SafetensorError("No space left on device")

    cached(live, tmp_path / "cache", batch_size=4)
    before = sorted(p.name for p in (tmp_path / "cache").iterdir())
    monkeypatch.setattr(shards, "save_file", full)
    more = trainer(tmp_path / "live", a_teacher(), rows=ROWS + 8)
    with pytest.raises(OSError, match="cache can't be written: No space left"):
        cached(more, tmp_path / "cache")
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == before


# ---- the command ---------------------------------------------------------------------------------


def on_disk(folder: Path) -> None:
    """A student, a teacher and data, as a recipe names them."""
    recipe = {
        **tiny.write_inputs(folder),
        "dataset_test_name": str(folder / "test.jsonl"),
        "eval_generate_rows": 0,
        "on_policy_weight": 0.0,
        "preference_weight": 0.0,
        "max_completion_length": 6,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    tiny.write_rows(folder / "test.jsonl", "test")
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "rtol"), [([], BF16_RTOL), (["--cache", "topk", f"--cache_top_k={tiny.VOCAB}"], 1e-5)]
)
def test_the_command_and_a_run_whose_teacher_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: list[str], rtol: float
) -> None:
    on_disk(tmp_path)
    recipe, cache = ["--config", str(tmp_path / "recipe.yaml")], tmp_path / "cache"
    assert cli.main(["train", *recipe, "--output_dir", str(tmp_path / "live")]) == 0
    made = ["cache-teacher", *recipe, *kind, "--output_dir", str(cache), "--batch_size", "5"]
    assert cli.main(made) == 0
    assert f"{2 * ROWS} entries written, 0 were there" in capsys.readouterr().out
    names = {p.name.split("-")[0] for p in cache.iterdir()}
    assert names - {"head"} == {"cache.json", "tokenizer", "shard"} and ("head" in names) != bool(
        kind
    )
    shutil.rmtree(tmp_path / "teacher")
    options = [*recipe, "--teacher_cache", str(cache), "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *options]) == 0
    figures = []
    for name in ("live", "run"):
        lines = [r["loss"] for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in r]
        after = json.loads((tmp_path / name / "evaluation.json").read_text())["after"]["mean"]
        figures.append([*lines, after["kl_to_teacher"], after["nll_per_token"]])
    assert figures[1] == pytest.approx(figures[0], rel=rtol)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--off_policy_weight", "0", "--on_policy_weight", "1"], "off_policy_weight must be"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--cache", "logits"], "cache must be one of hidden, topk, got 'logits'"),
        (["--cache", "topk", "--cache_top_k", "99999"], "cache_top_k must be at most 16384"),
        (["--output_dir", "{folder}"], "must be empty or hold a teacher's cache, it holds"),
        (
            ["--verbalizer_templates", "{en: '{{ student_completion }}'}", "--on_policy_weight=1"],
            "can't be cached before",
        ),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    on_disk(tmp_path)
    named = [word.format(folder=tmp_path) if "{folder}" in word else word for word in words]
    options = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "c")]
    assert cli.main(["cache-teacher", *options, *named]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "c").exists() or not any((tmp_path / "c").iterdir())


def test_one_process_makes_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk(tmp_path)
    monkeypatch.setattr(DuDiConfig, "world_size", 2)
    options = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "c")]
    assert cli.main(["cache-teacher", *options]) == 2
    assert "must be made in one process, got 2" in capsys.readouterr().err


def test_a_cache_of_another_teacher_by_name(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was made with .*, not with teacher_model_name_or_path"):
        trainer(
            tmp_path / "run", None, teacher_cache=str(cache), teacher_model_name_or_path="Other/B"
        )


def test_alone_means_off_policy(tmp_path: Path, cache: Path) -> None:
    settings = ALONE | {"off_policy_weight": 0.0, "on_policy_weight": 1.0}
    with pytest.raises(ValueError, match="needs teacher_model_name_or_path as well"):
        trainer(tmp_path / "run", None, teacher_cache=str(cache), **settings)
