"""Methods against their papers' formulas, and the grid: resumed, failing, reported."""

from __future__ import annotations

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
from dudi.ablation.cell import SELECTED_BY
from dudi.ablation.command import Run, run_ablation
from dudi.ablation.grid import Cell, Measured, cells_of, read_grid, resolved, selected, steps_of
from dudi.ablation.methods import method, methods
from dudi.ablation.own import _state
from dudi.ablation.report import BEGIN, END, charts, drawn, html
from dudi.ablation.results import Results, at, rate_told
from dudi.ablation.statistics import difference, estimate, values_of
from dudi.ablation.workers import run_tasks
from dudi.cli import main
from dudi.trainer import DuDiTrainer

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


def write_grid(folder: Path, **changes: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(TINY | changes), encoding="utf-8")
    return path


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


# ---- without running -----------------------------------------------------------------------------


def test_equal_seconds_become_steps() -> None:
    grid = read_grid("configs/ablation.yaml")
    measured = {"sft": Measured(1e-3, 0.1), "dudi": Measured(3e-4, 1.0)}
    long = Cell("equal_seconds", "sft", 0)
    assert steps_of(grid, long, measured) == 1000
    assert resolved(grid, long, measured)["options"]["learning_rate"] == 1e-3
    context = resolved(grid, Cell("main", "no_context", 0), measured)
    assert context["options"]["learning_rate"] == 3e-4


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
        ({"data": {"train": ROWS, "validation": ROWS}}, "students.base must have model_name"),
        ({"teachers": {"smollm2": {"model_name_or_path": "x"}}}, "names of their own, got smollm2"),
        ({"methods": {"dudi": {"like": "sft", "options": {}}}}, "names of their own, got dudi"),
        ({"methods": {"m": {"like": "dudi", "title": "SFT", "options": {}}}}, "'SFT' twice"),
        ({"methods": {"mine": {"like": "dudy", "options": {}}}}, "did you mean 'dudi'"),
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
    rows = {"dataset_name": names["dataset_name"]}
    config = write_grid(
        tmp_path,
        students={"base": {"model_name_or_path": names["model_name_or_path"]}},
        teachers={"mine": {"model_name_or_path": names["teacher_model_name_or_path"]}},
        data={"train": rows, "validation": rows},
        methods={"mild": {"like": "dudi", "options": {"ce_weight": 0.5}, "tuned_as": "dudi"}},
        settings={"main": TINY["settings"]["main"] | {"teacher": "mine", "methods": ["mild"]}},
    )

    def content() -> dict[str, Any]:
        _state.cache_clear()
        return resolved(read_grid(config), Cell("main", "mild", 0), {})

    first = content()
    assert first["options"]["ce_weight"] == 0.5 and first["options"]["off_policy_weight"] == 1
    assert first["files"].keys() == set(names.values())
    weights = tmp_path / "teacher" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert content() != first
    standard = resolved(read_grid("configs/ablation-small.yaml"), Cell("main", "sft", 0), {})
    assert not {"files", "own_teacher", "data_of"} & standard.keys()


def test_what_is_not_there_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = write_grid(tmp_path, teachers={"mine": {"model_name_or_path": "./nothing"}})
    out = tmp_path / "out"
    assert main(["ablate", "--config", str(config), "--output_dir", str(out)]) == 2
    assert "teachers.mine.model_name_or_path './nothing'" in capsys.readouterr().err
    assert not list(out.glob("*"))


def test_a_rate_at_an_end_of_the_sweep_is_marked() -> None:
    grid = read_grid("configs/ablation.yaml")
    told = [rate_told(grid, Measured(rate, 1.0)) for rate in (3e-5, 2e-3, 6e-3)]
    assert told == ["3e-05 (the lowest tried)", "0.002", "0.006 (the highest tried)"]


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
