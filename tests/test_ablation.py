"""Methods against their papers' formulas, and the grid: resumed, failing, reported."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from torch import Tensor

from dudi.ablation import cell as cells
from dudi.ablation.cell import done_result
from dudi.ablation.command import Run, parts_of, run_ablation
from dudi.ablation.grid import (
    Cell,
    Grid,
    Measured,
    cells_of,
    read_grid,
    resolved,
    selected,
    steps_of,
)
from dudi.ablation.methods import method, methods
from dudi.ablation.own import _state
from dudi.ablation.report import BEGIN, END, charts, drawn, html, markdown
from dudi.ablation.results import Results, Table, at, tables
from dudi.ablation.shared import map_part, responses_part, train_rows
from dudi.ablation.statistics import difference, estimate, values_of
from dudi.ablation.tuning import SELECTED_BY
from dudi.ablation.workers import run_tasks
from dudi.cli import main
from dudi.demo_data import data_path, translation_rows
from dudi.evaluation.tasks import evaluate_tasks as evaluate
from dudi.trainer import DuDiTrainer
from dudi_kernels import Verbalizer

STEPS, AT = 8, 4  # of a run, and where the formulas are looked at
QUIET = Console(quiet=True)


# ---- formulas, naive and in float64 --------------------------------------------------------------


def kl(lp: Tensor, lq: Tensor) -> Tensor:
    return (lp.exp() * (lp - lq)).sum(-1)


def mixed(lp: Tensor, lq: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)"""
    return (share * lp.exp() + (1 - share) * lq.exp()).log()


def jsd(lp: Tensor, lq: Tensor) -> Tensor:
    m = mixed(lp, lq, 0.5)
    return 0.5 * kl(lp, m) + 0.5 * kl(lq, m)


class Seen:
    """What a step has, as dense distributions: (rows, V) teacher lp, student lq; pairs' scores."""

    def __init__(self) -> None:
        self.plus: list[tuple[Tensor, Tensor]] = []
        self.minus: list[tuple[Tensor, Tensor]] = []
        self.ce: list[Tensor] = []
        self.scores: list[Tensor] = []  # log pi - log pi_ref, of y+ and y- in turn

    def mean(self, side: str, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat([formula(lp, lq) for lp, lq in getattr(self, side)]).mean()

    def cross_entropy(self) -> Tensor:
        return torch.cat(self.ce).mean()

    def preference(self) -> Tensor:
        gains = torch.stack(self.scores[::2]) - torch.stack(self.scores[1::2])
        return -F.logsigmoid(0.1 * gains).mean()


def off(s: Seen) -> Tensor:
    return s.mean("plus", kl)


def on(s: Seen) -> Tensor:
    return s.mean("minus", kl)


def skew(side: str, s: Seen) -> Tensor:
    return s.mean(side, lambda lp, lq: kl(lp, mixed(lp, lq, 0.1)))


FORMULAS: dict[str, Callable[[Seen], Tensor]] = {
    "sft": Seen.cross_entropy,
    "seqkd": Seen.cross_entropy,
    "forward_kl": off,
    "reverse_kl": lambda s: s.mean("plus", lambda lp, lq: kl(lq, lp)),
    "gkd": lambda s: 0.5 * s.mean("plus", jsd) + 0.5 * s.mean("minus", jsd),
    "minillm": lambda s: s.mean("minus", lambda lp, lq: kl(lq, lp)),
    # in the fifth of eight steps, on the way from 1 to 0.5 and from 0 to 0.5
    "distillm": lambda s: (1 - 0.5 * 4 / 7) * skew("plus", s) + 0.5 * 5 / 8 * skew("minus", s),
    "spin": Seen.preference,
    "dpo": Seen.preference,
    "dudi": lambda s: off(s) + on(s) + 0.1 * s.preference() + 0.2 * s.cross_entropy(),
    "no_off_policy": lambda s: on(s) + 0.1 * s.preference() + 0.2 * s.cross_entropy(),
    "no_on_policy": lambda s: off(s) + 0.1 * s.preference() + 0.2 * s.cross_entropy(),
    "no_sequence": lambda s: off(s) + on(s) + 0.2 * s.cross_entropy(),
    "no_context": lambda s: off(s) + on(s) + 0.1 * s.preference() + 0.2 * s.cross_entropy(),
}


def seen_by(trainer: DuDiTrainer, batch: Any) -> Seen:
    """Each sequence alone, from ids: [prompt, response], the teacher under its own prompt."""
    student, start, teacher = trainer.model.double(), tiny.model(0).double(), tiny.model(1).double()
    seen, verbalized = Seen(), method_reads_context(trainer)
    rows = {row["row"]: row for row in trainer.train_dataset}
    for i, ids in enumerate(batch.responses.ids):
        row = rows[batch.rows[batch.responses.prompts[i]]]
        given = batch.responses.segments[i] % 2 == 0
        lq, lr = (_predicted(m, row["prompt_ids"], ids) for m in (student, start))
        prompt = row["teacher_prompt_ids" if verbalized else "plain_prompt_ids"]
        lp = _predicted(teacher, prompt, ids).detach()
        (seen.plus if given else seen.minus).append((lp, lq))
        own, old = (x.gather(1, ids[:, None]).squeeze(1) for x in (lq, lr))
        seen.scores.append(own.sum() - old.sum().detach())
        if given:
            seen.ce.append(-own)
    return seen


def method_reads_context(trainer: DuDiTrainer) -> bool:
    return bool(trainer.args.context_verbalizer)


def _predicted(model: Any, prompt: list[int], response: Tensor) -> Tensor:
    ids = torch.cat([torch.tensor(prompt), response])
    return model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_method_is_its_paper_s_formula(name: str, tmp_path: Path) -> None:
    """Value and gradient of a step in the middle of a run, in which the student has moved."""
    options = method(name).resolved(STEPS) | {"max_steps": STEPS}
    config = tiny.config(tmp_path, **{"preference_weight": 0.0} | options)
    teacher = tiny.model(1) if config.needs_teacher else None
    trainer = DuDiTrainer(
        tiny.model(0),
        teacher,
        args=config,
        train_dataset=tiny.rows(40),
        processing_class=tiny.tokenizer(),
    )
    trainer.state.max_steps = STEPS
    batches = iter(trainer.get_train_dataloader())
    (inputs,), _ = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
    with torch.no_grad():
        for i, parameter in enumerate(trainer.model.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=_generator(i)))
    trainer.state.global_step = AT
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    got = {n: p.grad.double() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    want = FORMULAS[name](seen_by(trainer, inputs["batch"]))
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    for n, p in trainer.model.named_parameters():
        assert (got[n] - p.grad).norm() <= 2e-4 * p.grad.norm(), n


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_method_has_a_formula() -> None:
    """But the one that is DuDi's, over another map."""
    assert set(methods()) - {"no_vocabulary"} == set(FORMULAS)
    vocabulary = method("no_vocabulary")
    assert vocabulary.options == method("dudi").options | {"vocabulary_verbalizer": "same_text"}


def test_samples_are_drawn_by_the_policy_that_the_paper_says() -> None:
    """SPIN: the reference's, refreshed with it. DPO: the start's, once."""
    spin, dpo = method("spin").resolved(100), method("dpo").resolved(100)
    assert spin["rollout_steps"] == spin["reference_sync_steps"] == 25
    assert dpo["rollout_steps"] == 100 and dpo["reference"] == "initial"
    assert method("dpo").data == method("seqkd").data == "teacher"
    assert method("distillm").resolved(100)["rollout_steps"] == 5


# ---- statistics ----------------------------------------------------------------------------------


def rows_of(shift: float, seed: int, groups: int = 40) -> list[dict[str, Any]]:
    random = np.random.default_rng(7)  # the same rows for all
    hard = random.normal(2, 0.5, groups)
    noise = np.random.default_rng([11, seed]).normal(0, 0.01)
    return [
        {"row": i, "language": "th", "group": str(i), "nll": 10 * (h + shift + noise), "chars": 10}
        for i, h in enumerate(hard)
    ]


def test_pairing_takes_out_what_rows_and_seeds_share() -> None:
    new, old = (
        values_of("nll_per_char", {s: rows_of(shift, s) for s in range(3)})["mean"]
        for shift in (-0.1, 0.0)
    )
    alone, paired = estimate(new), difference(new, old)
    assert paired.value == pytest.approx(-0.1) and paired.clear
    assert paired.half < 1e-6 < 0.05 < alone.half
    assert not estimate(values_of("nll_per_char", {0: rows_of(0, 0)})["mean"]).clear


def test_intervals_cover() -> None:
    """95 % of them hold the truth, for three seeds that differ."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        by_seed = {}
        hard = random.normal(0, 1, 30)
        for seed in range(3):
            own = hard + random.normal(0, 0.3)
            by_seed[seed] = [
                {"language": "th", "group": str(i), "nll": x, "chars": 1} for i, x in enumerate(own)
            ]
        found = estimate(values_of("nll_per_char", by_seed)["mean"])
        hits += abs(found.value) <= found.half
    assert hits >= 184


def test_a_curve_is_read_between_its_points_and_not_beyond() -> None:
    points = ([0.0, 10.0, 20.0], [2.0, 1.0, 0.5])
    assert at(points, 5.0) == "1.500" and at(points, 20.0) == "0.500" and at(points, 21.0) == "–"


# ---- the grid ------------------------------------------------------------------------------------

TASK = "name: mine\nsource: {file: data.jsonl}\nexamples: true\n"

TINY: dict[str, Any] = {
    "seeds": [0, 1],
    "train_rows": 40,
    "students": {"base": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}},
    "warm_up": {"steps": 2, "batch": 2, "learning_rate": 2e-3},
    "training": {
        "max_completion_length": 6,
        "max_prompt_length": 64,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    },
    "evaluation": {"validation_rows": 10, "validations": 2, "generate_rows": 1},
    "domains": {
        "ui": {"task": "translation", "metrics": ["nll", "chrf"], "limit": 2},
        "udhr": {"task": "udhr", "metrics": ["nll"], "limit": 2},
    },
    "settings": {
        "main": {
            "title": "Main",
            "student": "base",
            "teacher": "embedded",
            "steps": 2,
            "kl": False,
            "methods": ["sft", "dpo", "dudi"],
        }
    },
}


ROWS = {"dataset_name": "rows.jsonl"}
RATES = {"learning_rates": [1e-3], "seed": 9, "setting": "main"}
EQUAL = TINY["settings"]["main"] | {
    "steps": None,
    "seconds_of": "dudi",
    "like": "main",
    "batch": 4,
}


def write_grid(folder: Path, **changes: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(TINY | changes), encoding="utf-8")
    return path


def own_inputs(names: dict[str, str]) -> dict[str, Any]:
    """Of a grid: models and rows of tiny.write_inputs."""
    rows = {"dataset_name": names["dataset_name"]}
    return {
        "students": {"base": {"model_name_or_path": names["model_name_or_path"]}},
        "teachers": {"mine": {"model_name_or_path": names["teacher_model_name_or_path"]}},
        "data": {"train": rows, "validation": rows | {"split": "train[:8]"}},
    }


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted((folder / "cells").glob("*.json"))}


def test_a_grid_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in part, then in whole; done cells are kept, changed and spoilt ones run again."""
    monkeypatch.setenv("DUDI_EVAL_DATA", str(tmp_path / "nothing"))
    config, out, docs = write_grid(tmp_path), tmp_path / "out", tmp_path / "results.md"
    docs.write_text(f"before\n{BEGIN}\nobsolete\n{END}\nafter\n", encoding="utf-8")
    run_ablation(config, out, only="seed=0", console=QUIET)
    first = stamps(out)
    assert len(first) == 4
    (out / "cells" / "main-sft-0.json").write_text('{"hash": "cut', encoding="utf-8")
    run_ablation(config, out, docs=docs, console=QUIET)
    second = stamps(out)
    assert len(second) == 8
    kept = [name for name in first if first[name] == second[name]]
    assert len(kept) == 3 and "main-sft-0.json" not in kept
    result = json.loads((out / "cells" / "main-dpo-1.json").read_text(encoding="utf-8"))
    assert [p["step"] for p in result["curve"]] == [1, 2]
    assert 0 < result["curve"][0]["seconds"] < result["seconds"]
    assert result["skipped"]["udhr"] and result["cell"]["options"]["rollout_steps"] == 2
    text = docs.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "obsolete" not in text
    assert "All 8 cells are done." in text and "Differences to DuDi" in text
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    own = report["settings"]["main"]["dudi"]
    assert own["differences"]["sft"]["ui"]["nll_per_char"]["seeds"] == 2
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    changed = write_grid(tmp_path, training=TINY["training"] | {"weight_decay": 0.1})
    run = Run(read_grid(changed), out, 1, QUIET)
    assert {c.method for c in run.done(cells_of(run.grid))} <= {"start"}


def _misbehave(task: str) -> None:
    if task == "raises":
        raise ValueError("what it says")
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)


def test_a_failing_task_costs_itself_alone() -> None:
    tasks = ["well", "raises", "dies", "again", "more"]
    found = {o.task: o.error for o in run_tasks(tasks, _misbehave, 2)}
    assert found.keys() == set(tasks)
    assert found["raises"] == "ValueError: what it says" and "-9" in str(found["dies"])
    assert [found[t] for t in ("well", "again", "more")] == [None, None, None]


def test_a_failing_cell_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_grid(
        tmp_path,
        settings={"main": TINY["settings"]["main"] | {"methods": ["sft", "dpo"], "steps": 30}},
        seeds=[0],
    )
    words = ["ablate", "--config", str(config), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--only", "method=sft,method=dpo"]) == 1  # 60 rows, there are 40
    assert "main-dpo-0" in capsys.readouterr().err
    assert list(stamps(tmp_path / "out")) == ["main-sft-0.json"]
    told = (tmp_path / "out" / "errors" / "main-dpo-0.txt").read_text(encoding="utf-8")
    assert "one epoch" in told


def test_a_trial_that_diverges_is_a_result(tmp_path: Path) -> None:
    """The sweep takes another rate; the method's cells are run with that."""
    tune = RATES | {"learning_rates": [1e-3, 1e30], "beyond": 0}
    setting = TINY["settings"]["main"] | {"methods": ["sft"]}
    config = write_grid(tmp_path, tune=tune, settings={"main": setting}, seeds=[0])
    out = tmp_path / "out"
    run_ablation(config, out, only="method=sft", console=QUIET)
    assert sorted(stamps(out)) == [
        "main-sft-0.json", "tune-main-sft-9-0.001.json", "tune-main-sft-9-1e+30.json",
    ]  # fmt: skip
    trial = json.loads((out / "cells" / "tune-main-sft-9-1e+30.json").read_text(encoding="utf-8"))
    assert "step 2" in trial["diverged"] and "curve" not in trial
    done = json.loads((out / "cells" / "main-sft-0.json").read_text(encoding="utf-8"))
    assert done["cell"]["options"]["learning_rate"] == 1e-3


# ---- without running -----------------------------------------------------------------------------


def test_equal_seconds_become_steps() -> None:
    grid = read_grid("configs/ablation.yaml")
    measured = {"sft": Measured(1e-3, 0.1), "dudi": Measured(3e-4, 1.0)}
    long = Cell("equal_seconds", "sft", 0)
    assert steps_of(grid, long, measured) == 1000
    assert resolved(grid, long, measured)["options"]["learning_rate"] == 1e-3


def test_pipes_do_not_cut_a_table() -> None:
    table = Table("", "t", "", ["a"], [["x || y"]])
    assert r"| x \|\| y |" in markdown(read_grid("configs/ablation.yaml"), {}, [table])


def test_the_standard_grid_pairs_what_it_compares() -> None:
    """Three seeds in every cell; the ablations everywhere start, train and are tested alike."""
    grid = read_grid("configs/ablation.yaml")
    every = cells_of(grid)
    assert {c.method for c in every} >= set(methods())
    assert all(len({c.seed for c in every if c[:2] == own[:2]}) >= 3 for own in every)
    assert grid.tune is not None and grid.tune.seed not in grid.seeds
    measured = {name: Measured(1e-3, 0.1) for name in methods()}
    contents = [resolved(grid, c, measured) for c in every if c[0] == "main" and c[2] == 0]
    same = ("student", "warm_up", "teacher", "evaluation", "domains", "languages")
    assert all({json.dumps(c[n]) for c in contents} == {json.dumps(contents[0][n])} for n in same)
    assert read_grid("configs/ablation-small.yaml").tune is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sedes": [1]}, "sedes"),
        ({"seeds": []}, "seeds"),
        ({"settings": {"a": TINY["settings"]["main"] | {"methods": ["dudy"]}}}, "did you mean"),
        ({"settings": {"a": TINY["settings"]["main"] | {"student": "huge"}}}, "settings.a.student"),
        ({"settings": {"a": TINY["settings"]["main"] | {"seconds_of": "dudi"}}}, "one of steps"),
        ({"training": {}}, "learning_rate"),
        ({"tune": {"learning_rates": [1e-3], "seed": 0, "setting": "main"}}, "tune.seed"),
        ({"students": {"base": {"model_name_or_path": "x", "hidden_size": 8}}}, "no hidden_size"),
        ({"warm_up": None}, "warm_up must be given: students.base is new"),
        ({"data": {"train": ROWS, "validation": ROWS}}, "different rows, got twice 'rows.jsonl'"),
        (
            {"data": {"train": ROWS, "validation": ROWS | {"split": "test"}}},
            "students.base must have model_name",
        ),
        ({"teachers": {"t": {"model_name_or_path": "x", "dtype": "bf16"}}}, "teachers.t.dtype"),
        ({"methods": {"start": {"like": "sft", "options": {}}}}, "names of their own, got start"),
        ({"methods": {"a-b": {"like": "sft", "options": {}}}}, "digits, _ and ., got 'a-b'"),
        (
            {"methods": {"m": {"like": "sft", "options": {"learning_rate": 1e-4}}}},
            "methods.m.options must leave learning_rate to the grid, got 0.0001",
        ),
        (
            {"methods": {"m": {"like": "sft", "options": {}, "tuned_as": "dudy"}}},
            "methods.m.tuned_as must be one of .* did you mean 'dudi'",
        ),
        ({"training": TINY["training"] | {"max_steps": 9}}, "training must leave max_steps to"),
        ({"training": TINY["training"] | {"ce_weight": 0.2}}, "training must leave ce_weight to"),
        ({"training": TINY["training"] | {"warmup_step": 3}}, "training: .*'warmup_steps'"),
        (
            {"tune": RATES, "settings": {"main": TINY["settings"]["main"], "b": EQUAL}},
            "settings.b.batch must be that of main, None, got 4",
        ),
        ({"teachers": {"smollm2": {"model_name_or_path": "x"}}}, "names of their own, got smollm2"),
        ({"methods": {"dudi": {"like": "sft", "options": {}}}}, "names of their own, got dudi"),
        ({"methods": {"m": {"like": "dudi", "title": "SFT", "options": {}}}}, "'SFT' twice"),
        (
            {"methods": {"mine": {"like": "dudy", "options": {}}}},
            r"yaml: methods.mine.like must be one of .* did you mean 'dudi'",
        ),
        ({"methods": {"mine": {"like": "dudi", "options": {"ce_weigth": 1}}}}, "'ce_weight'"),
        (
            {"methods": {"mine": {"like": "dudi", "options": {"ce_weight": "a"}}}},
            "methods.mine.opt",
        ),
        ({"domains": {"x": TINY["domains"]["udhr"] | {"split": "validation"}}}, "domains.x.split"),
    ],
)
def test_what_is_no_grid_is_told(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        read_grid(write_grid(tmp_path, **changes))


def test_cells_know_the_user_s_own_files(tmp_path: Path) -> None:
    """A file of another size or time is another cell; what has none is as it was."""
    names = tiny.write_inputs(tmp_path)
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    (tmp_path / "lexicon.tsv").write_text("", encoding="utf-8")
    config = write_grid(
        tmp_path,
        **own_inputs(names),
        tune=RATES,
        training=TINY["training"] | {"lexicon": str(tmp_path / "lexicon.tsv")},
        domains={"mine": {"task": str(tmp_path / "task.yaml"), "metrics": ["nll"]}},
        methods={"mild": {"like": "dudi", "options": {"ce_weight": 0.5}, "tuned_as": "dudi"}},
        settings={"main": TINY["settings"]["main"] | {"teacher": "mine", "methods": ["mild"]}},
    )

    def content(trial: float | None = None) -> dict[str, Any]:
        _state.cache_clear()
        cell = Cell("main", "mild", 0, trial)
        return resolved(read_grid(config), cell, {"mild": Measured(1e-3, 1.0)})

    first, trial = content(), content(1e-3)
    assert first["options"]["ce_weight"] == 0.5 and first["options"]["off_policy_weight"] == 1
    tested = {str(tmp_path / name) for name in ("task.yaml", "data.jsonl")}
    assert first["files"].keys() == {*names.values(), *tested, str(tmp_path / "lexicon.tsv")}
    os.utime(tmp_path / "task.yaml", ns=(1, 1))  # what is tested is no part of trials,
    second = content()
    assert second != first and content(1e-3) == trial
    assert (
        responses_part(tmp_path, second).path == responses_part(tmp_path, first).path
    )  # nor responses
    os.utime(tmp_path / "teacher" / "model.safetensors", ns=(1, 1))
    third = content()
    assert third != second and content(1e-3) != trial
    assert responses_part(tmp_path, third).path != responses_part(tmp_path, first).path
    os.utime(tmp_path / "lexicon.tsv", ns=(1, 1))
    assert content() != third
    standard = resolved(read_grid("configs/ablation-small.yaml"), Cell("main", "sft", 0), {})
    assert not {"files", "own_teacher", "data_of"} & standard.keys()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"teachers": {"mine": {"model_name_or_path": "./nothing"}}},
            "teachers.mine.model_name_or_path './nothing'",
        ),
        ({"domains": {"mine": {"task": "task.yaml", "metrics": ["nll"]}}}, "'data.jsonl'"),
        (
            {"domains": {"ui": {"task": "translation-choice", "metrics": ["nll"]}}},
            "domains.ui: metrics of a task with choices must be of accuracy",
        ),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_trained(
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text(TASK, encoding="utf-8")
    config, out = write_grid(tmp_path, **changes), tmp_path / "out"
    assert main(["ablate", "--config", str(config), "--output_dir", str(out)]) == 2
    assert told in capsys.readouterr().err
    assert not list(out.glob("*"))


def test_a_cell_reads_the_user_s_own_data_as_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations without a language, no option but the template's and what makes a batch."""
    names = tiny.write_inputs(tmp_path) | {"teacher_model_name_or_path": str(data_path("teacher"))}
    rows = [{"messages": r["prompt"] + r["completion"]} for r in translation_rows("train")[:12]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    template = {"chat_template_kwargs": {"enable_thinking": False}}
    setting = TINY["settings"]["main"] | {"teacher": "mine", "kl": True, "methods": "all"}
    config = write_grid(
        tmp_path,
        **own_inputs(names),
        training=batch | template | {"max_completion_length": 40, "learning_rate": 1e-3},
        evaluation={"validation_rows": 4, "validations": 5, "generate_rows": 0},
        domains={"mine": {"task": str(tmp_path / "task.yaml"), "metrics": ["nll", "kl"]}},
        settings={"main": setting},
    )
    with pytest.raises(ValueError, match="must have the column language for dudi, whose"):
        run_ablation(config, tmp_path / "out", only="method=dudi,method=sft", console=QUIET)
    run = Run(read_grid(config), tmp_path / "out", 1, QUIET)
    dpo, dudi = (run.job(Cell("main", name, 0), {}) for name in ("dpo", "no_context"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for parts in parts_of(dpo.folder, [dpo]):
        for part in parts:
            part()
    with pytest.raises(ValueError, match="steps must be at most 1 for dpo"):
        cells.run_cell(dpo)  # 2 steps of 4 batches of 2; there are 12 rows

    asked: list[dict[str, Any]] = []

    def asking(*args: Any, **settings: Any) -> Any:
        asked.append(settings)
        return evaluate(*args, **settings)

    monkeypatch.setattr(cells, "evaluate_tasks", asking)
    load, trainers = cells.loaded, []

    def loaded(*args: Any) -> Any:
        trainers.append(sum(type(each) is DuDiTrainer for each in gc.get_objects()))
        return load(*args)

    monkeypatch.setattr(cells, "loaded", loaded)
    cells.run_cell(dudi)
    assert trainers == [0]  # which would hold the teacher twice
    result = done_result(dudi)
    assert result is not None and [p["step"] for p in result["curve"]] == [1, 2]
    assert {name for row in result["domains"]["mine"]["rows"] for name in row} >= {"nll", "kl"}
    read = [(k["max_prompt_length"], k["chat_template_kwargs"]) for k in asked]
    assert read == [(512, {"enable_thinking": False})] * 3  # two validations and the test


def test_languages_of_the_user_s_own_rows_are_those_of_tasks(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    rows = [row | {"language": "TH", "source": "wiki"}, row | {"language": "en"}, row]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": {"dataset_name": str(path)}}
    kept = train_rows({"data_of": data, "languages": ["th"], "train_rows": None})
    assert [row["language"] for row in kept] == ["TH"]


def test_the_map_of_equal_texts_has_the_heads_sizes(tmp_path: Path) -> None:
    """Which most models pad beyond their tokenizers."""
    for name, size in (("student", tiny.VOCAB + 64), ("teacher", tiny.VOCAB + 128)):
        tiny.model(vocab=size).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    cell = {
        "teacher": "mine",
        "own_teacher": {"model_name_or_path": str(tmp_path / "teacher"), "dtype": "auto"},
        "student": {"model_name_or_path": str(tmp_path / "student")},
    }
    part = map_part(tmp_path, cell)
    part()
    found = Verbalizer.load(part.path, tiny.tokenizer(), tiny.tokenizer())
    assert (found.teacher_size, found.student_size) == (tiny.VOCAB + 128, tiny.VOCAB + 64)


def test_accuracy_stands_in_the_report() -> None:
    domains = {"choice": {"task": "translation-choice", "metrics": ["accuracy"]}}
    grid = Grid.model_validate(TINY | {"domains": domains})
    done = {
        Cell("main", name, seed): {
            "domains": {
                "choice": {
                    "rows": [
                        {"language": "th", "group": str(i), "correct": i < right, "questions": 1}
                        for i in range(8)
                    ]
                }
            },
            "environment": {"device": "cpu"},
            "curve": [{"seconds": 1.0, SELECTED_BY: 2.0}],
            "steps": 1,
            "seconds": 1.0,
        }
        for name, right in (("sft", 4), ("dudi", 6))
        for seed in (0, 1)
    }
    found = {table.title: table for table in tables(Results(grid, done), {})}
    assert found["Means"].head[-1] == "choice: accuracy ↑"
    assert found["Differences to SFT"].lines[0][-1].startswith("+0.250")


def test_a_method_has_one_colour_in_all_charts() -> None:
    grid = read_grid("configs/ablation.yaml")
    point = {"seconds": 1.0, SELECTED_BY: 2.0}
    run = {"curve": [point, point | {"seconds": 2.0}], "environment": {"device": "cpu"}}
    cells = [Cell("main", m, 0) for m in ("sft", "gkd", "dudi", "spin")]
    cells += [Cell("small_student", m, 0) for m in ("gkd", "dudi")]
    results = Results(grid, dict.fromkeys(cells, run))
    assert drawn(results) == ["sft", "gkd", "dudi", "spin"]
    text = html([], charts(results), [results.title(m) for m in drawn(results)], "")
    assert text.count('class="c2" points') == 2 and text.count('class="c0" points') == 1


def test_only() -> None:
    every = cells_of(read_grid("configs/ablation-small.yaml"))
    some = selected(every, "method=sft, method=dudi,seed=1")
    assert [(c.method, c.seed) for c in some] == [("sft", 1), ("dudi", 1)]
    with pytest.raises(ValueError, match="did you mean 'dudi'"):
        selected(every, "method=dudy")
    with pytest.raises(ValueError, match="only must be"):
        selected(every, "dudi")


def test_dry_run_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["ablate", "--config", "configs/ablation-small.yaml", "--dry_run"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--workers", "2"]) == 0
    assert "8 cells, 0 done" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert math.isclose(cells.TESTED_TOKENS, 64)
