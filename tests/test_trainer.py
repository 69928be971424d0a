"""The trainer against what its formulas say: signals, denominators, resuming, refusals."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaModel, TrainerCallback

from dudi.callbacks import read_jsonl
from dudi.config import DuDiConfig
from dudi.finite import NonFiniteLossError
from dudi.reference import AdapterOff, Reference, adds_nothing
from dudi.trainer import DuDiTrainer


def make(folder: Any, callbacks: Any = None, **settings: Any) -> DuDiTrainer:
    config = tiny.config(folder, **settings)
    return DuDiTrainer(
        tiny.model(0),
        tiny.model(1) if config.needs_teacher else None,
        args=config,
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
    )


def sequences(packed: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and row mask of each sequence, in their order."""
    found = []
    for group in packed.groups:
        for ids, seen, mask in zip(*group, strict=True):
            found.append((ids[seen.bool()], mask[seen.bool()]))
    starts = torch.tensor([0] + [int(mask.sum()) for _, mask in found]).cumsum(0)[:-1]
    return [found[i] for i in starts.apply_(packed.order.tolist().index).argsort()]


def naive_losses(trainer: DuDiTrainer, batch: Any) -> dict[str, torch.Tensor]:
    """The three signals from dense logits, one sequence at a time, in float64."""
    a = trainer.args
    student, teacher = trainer.model.double(), trainer.teacher.double()
    start = 0
    off, on, given, drawn = [], [], [], []
    pairs = zip(sequences(batch.student), sequences(batch.lesson.seen), strict=True)
    for i, ((ids, mask), (seen_ids, seen_mask)) in enumerate(pairs):
        rows = int(mask.sum())
        y = batch.student.targets[start : start + rows]
        start += rows
        lq = student(ids[None]).logits[0][mask].log_softmax(-1)
        lp = teacher(seen_ids[None]).logits[0][seen_mask].log_softmax(-1)
        ours, theirs = lq.gather(1, y[:, None]).sum(), lp.gather(1, y[:, None]).sum()
        if i % 2 == 0:
            off.append((lp.exp() * (lp - lq)).sum(-1))
            given.append((ours, theirs, rows))
        else:
            on.append((lq.exp() * (lq - lp)).sum(-1))
            drawn.append((ours, theirs, rows))
    gains = [
        (c - rc) / n**a.preference_length_power - (r - rr) / m**a.preference_length_power
        for (c, rc, n), (r, rr, m) in zip(given, drawn, strict=True)
    ]
    return {
        "off_policy_loss": torch.cat(off).mean(),
        "on_policy_loss": torch.cat(on).mean(),
        "preference_loss": -F.logsigmoid(a.preference_beta * torch.stack(gains)).mean(),
    }


@pytest.mark.parametrize("length_power", [0, 1])
def test_step_equals_dense_formulas(tmp_path: Path, length_power: int) -> None:
    """Values and the gradient of one whole step, the teacher under its own (verbalized) prompt."""
    trainer = make(tmp_path, reference="teacher", preference_length_power=length_power)
    assert trainer.verbalizer is not None
    iterator = iter(trainer.get_train_dataloader())
    (inputs,), _ = trainer.get_batch_samples(iterator, 1, torch.device("cpu"))
    batch = inputs["batch"]
    assert batch.student.num_tokens != batch.lesson.seen.num_tokens
    trainer.current_gradient_accumulation_steps = 1
    loss, output = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    loss.backward()
    got = {n: p.grad.double() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    want = naive_losses(trainer, batch)
    total = want["off_policy_loss"] + want["on_policy_loss"] + 0.5 * want["preference_loss"]
    total.backward()
    for name, value in want.items():
        assert getattr(output, name).item() == pytest.approx(value.item(), rel=1e-4)
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        want_grad = parameter.grad
        error = (got[name] - want_grad).norm() / want_grad.norm()
        assert error < 1e-4, name


def test_compiled_bodies_give_the_same_losses(tmp_path: Path, monkeypatch: Any) -> None:
    """Of student, teacher and reference; weights are there once."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = make(tmp_path / "False", max_steps=2)
    compiled = make(tmp_path / "True", max_steps=2, compile_bodies=True)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    for trainer in (plain, compiled):
        trainer.train()
    for a, b in zip(*(tiny.logged(tmp_path / str(x)) for x in (False, True)), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)


def test_activations_may_be_made_twice(tmp_path: Path) -> None:
    """In the student's body, with the same losses."""
    counts = {}
    for twice in (False, True):
        trainer = make(tmp_path / str(twice), activation_checkpointing=twice, max_steps=2)
        calls: list[int] = []
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        trainer.train()
        counts[twice] = len(calls)
    assert counts[True] == counts[False] + 2
    saved, made = (tiny.logged(tmp_path / str(twice)) for twice in (False, True))
    assert saved == made


def test_liger_s_kernels_but_not_its_losses(tmp_path: Path, monkeypatch: Any) -> None:
    told = []
    monkeypatch.setattr(
        "transformers.trainer.apply_liger_kernel", lambda model, kernels: told.append(kernels)
    )
    make(tmp_path, max_steps=1, use_liger_kernel=True, liger_kernel_config={"rope": True}).train()
    assert told == [{"rope": True, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_without_padding_the_losses_are_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    """Of student, teacher and reference, and those of an evaluation."""
    figures, seen = [], set()
    own = LlamaModel.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.add(kwargs.get("attention_mask") is None)
        return own(*args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    for free in (False, True):
        trainer = make(tmp_path / str(free), padding_free=free)
        trainer.train()
        seen.clear()
        figures.append(trainer.evaluate(tiny.rows(12, "test")))
        assert seen == {free}
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    padded, packed = (tiny.logged(tmp_path / str(free)) for free in (False, True))
    for a, b in zip(padded, packed, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Every mean is over the global batch, however it is cut into micro-batches."""
    finals = []
    for size, accumulation in ((8, 1), (2, 4)):
        folder = tmp_path / str(size)
        trainer = make(
            folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            on_policy_weight=0.0,
            preference_weight=0.0,  # samples depend on the micro-batch they are drawn in
            optim="sgd",
            max_grad_norm=0.0,
            max_steps=2,
        )
        trainer.train()
        finals.append(
            [tiny.logged(folder)[-1]["off_policy_loss"], *map(float, _norms(trainer.model))]
        )
    assert finals[0] == pytest.approx(finals[1], rel=1e-5)


def _norms(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().double().norm() for p in model.parameters()]


def test_same_seed_same_losses(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name).train()
    assert tiny.logged(tmp_path / "a") == tiny.logged(tmp_path / "b")


@pytest.mark.parametrize(
    ("reference", "ahead"),
    [
        ("initial", {}),
        ("lagged", {}),
        (
            "initial",
            {
                "rollout_steps": 5,
                "rollout_importance": True,
                "num_generations": 2,
                "weight_schedules": {"ce_weight": {"kind": "linear"}},
                "ce_weight": 0.5,
            },
        ),
    ],
    ids=["initial", "lagged", "samples ahead"],
)
def test_resuming_continues_the_curve_exactly(
    tmp_path: Path, reference: str, ahead: dict[str, Any]
) -> None:
    """Also in the middle of a log window, past a refresh of the lagged reference, with samples
    that are drawn and not trained on yet, and in an epoch after y+ was scored."""
    settings = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "reference": reference,
        "reference_sync_steps": 2,
        **ahead,
    }
    whole = make(tmp_path / "whole", **settings)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    make(tmp_path / "cut", callbacks=[Stop()], **settings).train()
    resumed = make(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.logged(tmp_path / "cut") == tiny.logged(tmp_path / "whole")
    ends = [read_jsonl(tmp_path / name / "metrics.jsonl")[-1] for name in ("cut", "whole")]
    assert ends[0]["train_loss"] == pytest.approx(ends[1]["train_loss"], rel=1e-6)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_has_no_step_more(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    done = make(tmp_path, **settings)
    done.train()
    again = make(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and len(tiny.logged(tmp_path)) == 2
    assert not (tmp_path / "checkpoint-3").exists()
    for a, b in zip(again.model.parameters(), done.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ctrl_c_saves_and_resumes(tmp_path: Path) -> None:
    class Press(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    make(tmp_path / "whole").train()
    trainer = make(tmp_path / "cut", callbacks=[Press()])
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 2
    assert (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").exists()
    resumed = make(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.interrupted
    assert tiny.logged(tmp_path / "cut") == tiny.logged(tmp_path / "whole")


def test_ctrl_c_in_the_last_step_ends_the_run_as_usual(tmp_path: Path) -> None:
    class Press(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make(tmp_path, callbacks=[Press()])
    trainer.train()
    assert not trainer.interrupted and trainer.state.global_step == 4


def test_teacher_scores_only_the_side_that_needs_it(tmp_path: Path) -> None:
    """off_policy_weight=0 with cross-entropy: the teacher reads y- alone, to the same loss."""
    losses_seen = []
    for sides in (None, (0, 1)):
        folder = tmp_path / str(sides)
        trainer = make(folder, off_policy_weight=0.0, preference_weight=0.0, ce_weight=1.0)
        if sides is None:
            assert trainer.args.taught_sides == (1,)
        else:
            trainer.args.__class__ = type("Both", (DuDiConfig,), {"taught_sides": sides})
        trainer.train()
        losses_seen.append([r["loss"] for r in tiny.logged(folder)])
    assert losses_seen[0] == pytest.approx(losses_seen[1], rel=1e-6)


def test_zero_weights_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No samples without a signal that needs them; no teacher for plain cross-entropy."""
    monkeypatch.setattr("dudi.sampling.generate", lambda *a, **k: pytest.fail("sampled"))
    monkeypatch.setattr("dudi.trainer.load_model", _no_strings)
    off = {"on_policy_weight": 0.0, "preference_weight": 0.0}
    make(tmp_path / "off", max_steps=1, **off).train()
    plain = DuDiTrainer(
        tiny.model(0),
        "a/teacher/that/is/not/there",
        args=tiny.config(tmp_path / "ce", max_steps=1, off_policy_weight=0, ce_weight=1, **off),
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
    )
    plain.train()
    assert plain.teacher is None
    assert tiny.logged(tmp_path / "ce")[0]["loss"] == pytest.approx(
        tiny.logged(tmp_path / "ce")[0]["ce_loss"], rel=1e-5
    )


def _no_strings(model: Any, kwargs: Any, argument: str) -> Any:
    assert not isinstance(model, str), "loaded a model that nothing needs"
    return model


def test_logged_metrics(tmp_path: Path) -> None:
    make(tmp_path, ce_weight=0.1).train()
    wanted = {
        "loss", "entropy", "num_tokens", "grad_norm", "learning_rate",
        "completions/mean_length", "completions/clipped_ratio",
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected",
        "off_policy_loss", "on_policy_loss", "preference_loss", "ce_loss",
    }  # fmt: skip
    for record in tiny.logged(tmp_path):
        assert wanted <= record.keys()
        parts = record["off_policy_loss"] + record["on_policy_loss"]
        parts += 0.5 * record["preference_loss"] + 0.1 * record["ce_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-4)
    assert tiny.logged(tmp_path)[0]["rewards/margins"] == pytest.approx(
        0, abs=1e-4
    )  # pi = reference


def test_gradient_tolerance(tmp_path: Path) -> None:
    """The loss stays exact; what was left out of its gradient is logged."""
    found = []
    for name, tolerance in (("exact", 0.0), ("some", 0.3)):
        make(tmp_path / name, gradient_tolerance=tolerance, max_steps=1).train()
        found.append(tiny.logged(tmp_path / name)[0])
    assert "skipped_logits" not in found[0] and 0 <= found[1]["skipped_logits"] <= 1
    assert found[0]["loss"] == found[1]["loss"]


def test_checkpoint_loads_with_from_pretrained(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def lora(rank: int = 2, alpha: int = 4) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )


def make_adapted(folder: Any, peft_config: Any, **settings: Any) -> DuDiTrainer:
    return DuDiTrainer(
        tiny.model(0),
        tiny.model(1),
        args=tiny.config(folder, **settings),
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}


def test_peft_trains_the_adapter_only(tmp_path: Path) -> None:
    trainer = make_adapted(tmp_path, lora(), **SAVING)
    trainer.train()
    assert isinstance(trainer.reference, AdapterOff)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-2" / "reference.safetensors").exists()
    assert tiny.logged(tmp_path)[1]["rewards/margins"] != 0
    make_adapted(tmp_path, lora(), **SAVING).check_resumable()


def test_a_copy_of_an_adapter_equals_the_model_under_it(tmp_path: Path) -> None:
    """A new adapter changes nothing, so that switching it off is the start; a trained one is
    copied, and so is what lags."""
    runs = []
    for name in ("off", "copied"):
        trainer = make_adapted(tmp_path / name, lora())
        if name == "copied":
            trainer.reference = Reference(trainer.model)
            assert all("lora_" in n for n in trainer.reference.weights)
        trainer.train()
        runs.append(tiny.logged(tmp_path / name))
    assert runs[0] == runs[1]
    assert not adds_nothing(trainer.model) and not adds_nothing(tiny.model(0))
    lagged = make_adapted(tmp_path / "lagged", lora(), reference="lagged")
    assert isinstance(lagged.reference, Reference)


def test_a_reference_in_half_precision_on_the_cpu(tmp_path: Path) -> None:
    trainer = make(tmp_path / "half", reference_dtype="bfloat16", reference_on_cpu=True)
    assert isinstance(trainer.reference, Reference)
    assert {w.dtype for w in trainer.reference.weights.values()} == {torch.bfloat16}
    trainer.train()
    make(tmp_path / "whole").train()
    half, whole = (tiny.logged(tmp_path / name) for name in ("half", "whole"))
    assert half[0]["rewards/margins"] != whole[0]["rewards/margins"] == 0
    assert half[0]["rewards/margins"] == pytest.approx(0, abs=0.2)


def test_given_responses_are_scored_once(tmp_path: Path, monkeypatch: Any) -> None:
    """By a reference that never changes; the second epoch of 24 rows begins in step 7."""
    counts: list[int] = []
    own = DuDiTrainer._under_reference

    def counted(self: Any, batch: Any, wanted: list[int]) -> Any:
        counts.append(len(wanted))
        return own(self, batch, wanted)

    monkeypatch.setattr(DuDiTrainer, "_under_reference", counted)
    make(tmp_path / "initial", max_steps=8).train()
    assert counts == [8] * 6 + [4] * 2
    counts.clear()
    make(tmp_path / "lagged", max_steps=8, reference="lagged").train()
    assert counts == [8] * 8


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (lora(alpha=640), "adapter lora_alpha was 4, is 640"),
        (lora(rank=3), "adapter r was 2, is 3"),
        (None, "it has a LORA, this run no adapter"),
    ],
)
def test_refuses_checkpoint_of_another_adapter(
    tmp_path: Path, peft_config: Any, message: str
) -> None:
    make_adapted(tmp_path, lora(), **SAVING).train()
    with pytest.raises(ValueError, match=message):
        make_adapted(tmp_path, peft_config, **SAVING).train(resume_from_checkpoint=True)


def test_refuses_checkpoint_of_the_whole_model_for_an_adapter(tmp_path: Path) -> None:
    make(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match="it has no adapter, this run a LORA"):
        make_adapted(tmp_path, lora(), **SAVING).check_resumable()


def test_refuses_checkpoint_of_other_data(tmp_path: Path) -> None:
    make(tmp_path, **SAVING).train()
    rows = tiny.rows()
    changed = [dict(row) for row in rows]
    changed[7]["completion"] = [{"role": "assistant", "content": "!"}]
    for data, message in ((rows.select(range(20)), "24 rows, has 20"), (changed, "other content")):
        trainer = DuDiTrainer(
            tiny.model(0),
            tiny.model(1),
            args=tiny.config(tmp_path, **SAVING),
            train_dataset=Dataset.from_list(list(data)),
            processing_class=tiny.tokenizer(),
        )
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)


def test_refuses_checkpoint_of_another_model(tmp_path: Path) -> None:
    make(tmp_path, **SAVING).train()
    other = tiny.model(0)
    other.config.rope_parameters["rope_theta"] = 5e5
    trainer = DuDiTrainer(
        other,
        tiny.model(1),
        args=tiny.config(tmp_path, **SAVING),
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
    )
    with pytest.raises(ValueError, match="rope_parameters"):
        trainer.check_resumable()


def test_refuses_checkpoint_with_another_reference(tmp_path: Path) -> None:
    make(tmp_path, **SAVING).train()
    trainer = make(tmp_path, **SAVING)
    trainer.model.model.embed_tokens.weight.requires_grad_(False)
    trainer.reference = Reference(trainer.model)
    with pytest.raises(ValueError, match=r"reference model.embed_tokens.weight.*without"):
        trainer.check_resumable()


# ---- what is not finite --------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Spoils the model when step 3 has drawn its samples."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].model.norm.weight.data.fill_(float("nan"))


class PoisonAfterSaving(TrainerCallback):
    """Spoils the model after step 2 is saved, and so before step 3 draws its samples."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].model.norm.weight.data.fill_(float("nan"))


class PoisonGradient(TrainerCallback):
    """A NaN in one gradient of step 3, the loss being finite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            weight = kwargs["model"].model.norm.weight
            weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), float("nan")))


@pytest.mark.parametrize(
    ("fault", "settings", "message"),
    [
        (Poison(), {}, "the loss is nan"),
        (PoisonAfterSaving(), {}, "logits are not finite in sampling"),
        (PoisonGradient(), {}, "a gradient is not finite"),
        (PoisonGradient(), {"max_grad_norm": 0.0}, "a gradient is not finite"),
    ],
)
def test_stops_at_what_is_not_finite(
    tmp_path: Path, fault: Any, settings: dict[str, Any], message: str
) -> None:
    """Names step and rows, takes no step, keeps the last good checkpoint."""
    saving = {"save_strategy": "steps", "save_steps": 1, "reference": "teacher"}
    trainer = make(tmp_path, callbacks=[fault], **saving, **settings)
    with pytest.raises(NonFiniteLossError, match=rf"step 3: .*{message}.*rows \[.*checkpoint-2"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for name in ("checkpoint-1", "checkpoint-2"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(torch.isfinite(p).all() for p in loaded.parameters())


def test_never_saves_weights_that_are_not_finite(tmp_path: Path) -> None:
    """A learning rate beyond all bounds: the step itself destroys the weights."""

    class Explode(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                kwargs["model"].model.norm.weight.data.fill_(float("inf"))

    trainer = make(tmp_path, callbacks=[Explode()], save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteLossError, match=r"not finite after step 2.*checkpoint-1"):
        trainer.train()
    assert not (tmp_path / "checkpoint-2").exists()
    with pytest.raises(NonFiniteLossError, match="were not saved"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_refuses_other_vocabulary(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"teacher_tokenizer_name_or_path .*16400.*16384"):
        DuDiTrainer(
            tiny.model(0),
            tiny.model(1, vocab=16_400),
            args=tiny.config(folder),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
        )
    assert not folder.exists()


def test_refuses_missing_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_model"):
        DuDiTrainer(
            tiny.model(0),
            args=tiny.config(tmp_path / "run"),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"learning_rate": 5e-4}, "learning_rate"), ({"reference": "lagged"}, "reference")],
)
def test_refuses_checkpoint_of_another_recipe(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, **saving).train()
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **(saving | change)).train(resume_from_checkpoint=True)


def test_refuses_half_written_checkpoint(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make(tmp_path, **saving).train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"half')
    trainer = make(tmp_path, **saving)
    with pytest.warns(UserWarning, match="checkpoint-2 is not whole .*trainer_state.json has 6"):
        trainer.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    with pytest.raises(ValueError, match="whole checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_evaluate_reports_languages(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    metrics = trainer.evaluate(tiny.rows(12, "test"))
    assert metrics["eval_kl_to_teacher"] > 0
    assert "eval_th_nll_per_char" in metrics
