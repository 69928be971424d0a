"""Samples for steps to come, several of a prompt, and weights that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_trainer import make, sequences

from dudi.rollout import cut_at_stop, generate
from dudi.schedules import Schedule


def first_step(trainer: Any) -> Any:
    trainer.state.max_steps = 4
    iterator = iter(trainer.get_train_dataloader())
    (inputs,), _ = trainer.get_batch_samples(iterator, 1, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    return inputs


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_several_samples_of_a_prompt(tmp_path: Path, kind: str) -> None:
    """Three of each, beside dense formulas."""
    trainer = make(
        tmp_path, num_generations=3, preference_loss=kind, preference_margin=0.2,
        preference_length_power=1, reference="none", preference_beta=2.0,
    )  # fmt: skip
    inputs = first_step(trainer)
    batch = inputs["batch"]
    assert len(batch.responses.ids) == 4 * 4 and batch.counts[2] == 12
    assert len({tuple(c.tolist()) for c in batch.drawn.completions}) > 4
    _, output = trainer.compute_loss(trainer.model, inputs, return_outputs=True)

    student, teacher = trainer.model.double(), trainer.teacher.double()
    on, scores = [], []
    for i, ((ids, mask), (seen, seen_mask)) in enumerate(
        zip(sequences(batch.student), sequences(batch.lesson.seen), strict=True)
    ):
        lq = student(ids[None]).logits[0][mask].log_softmax(-1)
        lp = teacher(seen[None]).logits[0][seen_mask].log_softmax(-1)
        scores.append(lq.gather(1, batch.responses.ids[i][:, None]).mean())
        if i % 4:
            on.append((lq.exp() * (lq - lp)).sum(-1))
    by_prompt = torch.stack(scores).view(4, 4)
    z = 2 * (by_prompt[:, :1] - by_prompt[:, 1:]) - 0.2
    costs = {"sigmoid": -F.logsigmoid(z), "hinge": F.relu(1 - z), "ipo": ((z - 0.5) / 2) ** 2}
    assert output.on_policy_loss.item() == pytest.approx(torch.cat(on).mean().item(), rel=1e-4)
    assert output.preference_loss.item() == pytest.approx(costs[kind].mean().item(), rel=1e-4)


def test_samples_ahead_are_those_of_the_first_policy(tmp_path: Path) -> None:
    """Of a policy that stands still they are the same as drawn step by step."""
    one, ahead = (
        make(tmp_path / str(k), learning_rate=0.0, rollout_steps=k, max_steps=4) for k in (1, 3)
    )
    drawn: dict[str, list[Any]] = {"one": [], "ahead": []}
    for name, trainer in (("one", one), ("ahead", ahead)):
        own = trainer.compute_loss

        def noted(*args: Any, name: str = name, own: Any = own, **kwargs: Any) -> Any:
            drawn[name].append(args[1]["batch"].drawn)
            return own(*args, **kwargs)

        trainer.compute_loss = noted
        trainer.train()
    assert [d.step for d in drawn["one"]] == [0, 1, 2, 3]
    assert [d.step for d in drawn["ahead"]] == [0, 0, 0, 3]
    for a, b in zip(drawn["one"], drawn["ahead"], strict=True):
        assert all(map(torch.equal, a.completions, b.completions))
    found = tiny.logged(tmp_path / "3")
    assert [r["rollout_staleness"] for r in found] == [0, 1, 2, 0]
    for a, b in zip(tiny.logged(tmp_path / "1"), found, strict=True):
        assert a["loss"] == b["loss"]


def test_samples_of_an_older_policy_weigh_less(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rollout_steps": 2, "max_steps": 2, "learning_rate": 3e-2}
    runs = {}
    for weighed in (False, True):
        trainer = make(
            tmp_path / str(weighed), rollout_importance=weighed, off_policy_weight=0.0,
            preference_weight=0.0, **settings,
        )  # fmt: skip
        trainer.train()
        runs[weighed] = tiny.logged(tmp_path / str(weighed))
    assert runs[True][0] == runs[False][0] | {}
    share = runs[True][1]["rollout_importance"]
    assert 0 < share < 1
    assert runs[True][1]["on_policy_loss"] < runs[False][1]["on_policy_loss"]


def test_importance_is_the_ratio_of_probabilities(tmp_path: Path) -> None:
    trainer = make(tmp_path, rollout_steps=2, rollout_importance=True)
    inputs = first_step(trainer)
    batch = inputs["batch"]
    then = batch.drawn.log_prob
    assert then is not None and len(then) == sum(map(len, batch.drawn.completions))
    trainer.state.global_step = 1
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.5)
    now = []
    for i, (ids, mask) in enumerate(sequences(batch.student)):
        if i % 2:
            lq = trainer.model(ids[None]).logits[0][mask].double().log_softmax(-1)
            now.append(lq.gather(1, batch.responses.ids[i][:, None])[:, 0])
    want = (torch.cat(now) - then).clamp(max=0).exp().mean().item()
    trainer.compute_loss(trainer.model, inputs)
    total, count = trainer.meter.sums["rollout_importance"].tolist()
    assert total / count == pytest.approx(want, rel=1e-4) and want < 0.95


@pytest.mark.parametrize("size", [3, 64])
def test_sequences_that_are_drawn_together(tmp_path: Path, size: int) -> None:
    """Whatever micro-batches they belong to, they come back to their prompts."""
    greedy = {"rollout_temperature": 1e-4, "max_steps": 1, "gradient_accumulation_steps": 2}
    whole, together = (
        make(tmp_path / str(n), rollout_batch_size=n, num_generations=2, **greedy)
        for n in (None, size)
    )
    found = []
    for trainer in (whole, together):
        iterator = iter(trainer.get_train_dataloader())
        inputs, _ = trainer.get_batch_samples(iterator, 2, torch.device("cpu"))
        found.append([c.tolist() for i in inputs for c in i["batch"].drawn.completions])
    assert found[0] == found[1]


def test_a_schedule_is_a_function_of_the_step() -> None:
    linear = Schedule("linear", None, 0.2)
    assert [linear.factor(s, 5) for s in (0, 2, 4)] == pytest.approx([1, 0.6, 0.2])
    assert Schedule("linear", 3, 0.0).factor(50, 100) == 0
    warmup = Schedule("warmup", 4)
    assert [warmup.factor(s, 99) for s in (0, 1, 3, 50)] == [0.25, 0.5, 1, 1]
    assert Schedule().factor(7, 9) == 1


def test_weights_follow_their_schedules(tmp_path: Path) -> None:
    schedules = {
        "on_policy_weight": {"kind": "warmup", "steps": 2},
        "off_policy_weight": {"kind": "linear", "end": 0.5},
    }
    make(tmp_path, weight_schedules=schedules, max_steps=3).train()
    found = tiny.logged(tmp_path)
    assert [r["weights/on_policy_weight"] for r in found] == [0.5, 1, 1]
    assert [r["weights/off_policy_weight"] for r in found] == [1, 0.75, 0.5]
    for r in found:
        own = r["weights/on_policy_weight"] * r["on_policy_loss"]
        own += r["weights/off_policy_weight"] * r["off_policy_loss"] + 0.5 * r["preference_loss"]
        assert r["loss"] == pytest.approx(own, rel=1e-3)


def test_stop_strings_end_a_sample() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model(0)
    prompts = [torch.tensor(tokenizer("Open the file")["input_ids"])] * 8
    settings: dict[str, Any] = {
        "max_completion_length": 12, "eos_token_id": 1, "pad_token_id": 1, "seed": 3,
    }  # fmt: skip
    plain = generate(model, prompts, **settings)
    letter = next(c for c in tokenizer.decode(plain.completions[0][3:5]) if c.isalpha())
    got = generate(model, prompts, stop_strings=[letter], tokenizer=tokenizer, **settings)
    for completion, reason in zip(got.completions, got.finish_reasons, strict=True):
        text = tokenizer.decode(completion)
        assert (letter in text) == (reason == "stop")
        assert letter not in tokenizer.decode(completion[:-1])
    assert "stop" in got.finish_reasons
    assert cut_at_stop(plain.completions[0], ["\0"], tokenizer) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 0}, "num_generations must be in"),
        ({"rollout_steps": 0}, "rollout_steps must be in"),
        ({"preference_loss": "dpo"}, "preference_loss must be one of sigmoid, hinge, ipo"),
        ({"reference_dtype": "int8"}, "reference_dtype must be one of float32, bfloat16"),
        ({"generation_kwargs": {"min_q": 0.1}}, "generation_kwargs must be one of.*min_p"),
        ({"generation_kwargs": {"max_new_tokens": 4}}, "generation_kwargs must be one of"),
        ({"stop_strings": [""]}, "stop_strings must not be empty"),
        ({"weight_schedules": {"kd": {}}}, "weight_schedules must be one of off_policy_weight"),
        ({"weight_schedules": {"ce_weight": {"kind": "linear"}}}, "ce_weight must be positive"),
        (
            {"weight_schedules": {"on_policy_weight": {"kind": "cosine"}}},
            "kind of weight_schedules.'on_policy_weight'. must be one of constant, linear, warmup",
        ),
        (
            {"weight_schedules": {"on_policy_weight": {"kind": "linear", "to": 3}}},
            "must have no more than kind, steps, end, got 'to'",
        ),
        (
            {"weight_schedules": {"on_policy_weight": {"kind": "warmup", "steps": 0}}},
            "steps of weight_schedules.'on_policy_weight'. must be at least 1, got 0",
        ),
        (
            {"weight_schedules": {"on_policy_weight": {"kind": "linear", "end": -1}}},
            "end of weight_schedules.'on_policy_weight'. must be a factor of 0 or more, got -1",
        ),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)
