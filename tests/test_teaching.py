"""What the teacher teaches, beside dense float64: another tokenizer, other weights, other words."""

from __future__ import annotations

import copy
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vocabularies
from datasets import Dataset

from dudi.demo_data import ui_strings
from dudi.evaluate import evaluate_model
from dudi.teaching import confidence
from dudi.trainer import DuDiTrainer
from dudi_kernels import Verbalizer

ALONE: dict[str, Any] = {"preference_weight": 0.0, "verbalizer_cache_dir": None}
GIVEN: dict[str, Any] = {**ALONE, "on_policy_weight": 0.0}


def teacher_tokenizer() -> Any:
    """Another one than the student's, with a chat template and a special token of its own."""
    tokenizer = copy.deepcopy(vocabularies.trained_byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return tokenizer


def make(folder: Any, *, other: bool = False, rows: Any = None, **settings: Any) -> DuDiTrainer:
    """With a teacher of another tokenizer, or of the same."""
    own = teacher_tokenizer() if other else None
    return DuDiTrainer(
        tiny.model(0),
        tiny.model(1, vocab=len(own) if own else tiny.VOCAB),
        args=tiny.config(folder, **(ALONE | settings)),
        train_dataset=tiny.rows() if rows is None else rows,
        processing_class=tiny.tokenizer(),
        teacher_processing_class=own,
    )


def step(trainer: DuDiTrainer) -> tuple[Any, Any]:
    """The first micro-batch and what the loss gives for it."""
    (inputs,), _ = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), 1, torch.device("cpu")
    )
    trainer.current_gradient_accumulation_steps = 1
    _, output = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    return inputs["batch"], output


def sequences(packed: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and row mask of each sequence that has rows, in their order."""
    found = []
    for group in packed.groups:
        for ids, seen, mask in zip(*group, strict=True):
            found.append((ids[seen.bool()], mask[seen.bool()]))
    lengths = [int(mask.sum()) for _, mask in found]
    starts, places = [0, *accumulate(lengths)], packed.order.tolist()
    whole = (i for i, length in enumerate(lengths) if length)
    return [found[i] for i in sorted(whole, key=lambda i: places.index(starts[i]))]


@torch.no_grad()
def log_probs(model: Any, packed: Any) -> torch.Tensor:
    """(N, V) of the response rows, one sequence at a time, in float64."""
    model = model.double()
    rows = [model(ids[None]).logits[0][mask].log_softmax(-1) for ids, mask in sequences(packed)]
    model.float()
    return torch.cat(rows)


def classes(verbalizer: Any, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """P and Q with one class more for what is left."""
    mass, own = verbalizer.project(p), q[:, verbalizer.matched]
    mass = mass[:, verbalizer.matched]
    return tuple(torch.cat([x, (1 - x.sum(1, keepdim=True))], 1).clamp(1e-30) for x in (mass, own))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def test_a_teacher_with_another_tokenizer_equals_dense_formulas(tmp_path: Path) -> None:
    trainer = make(tmp_path, other=True)
    batch, output = step(trainer)
    lesson, segments = batch.lesson, batch.student.segment_ids
    assert lesson.seen.num_tokens != batch.student.num_tokens
    assert 0 < len(lesson.student_rows) < len(segments)
    p = log_probs(trainer.teacher, lesson.seen).exp()[lesson.teacher_rows]
    q = log_probs(trainer.model, batch.student).exp()[lesson.student_rows]
    mass, own = classes(trainer.bridge.verbalizer, p, q)
    given = segments[lesson.student_rows] % 2 == 0
    off, on = kl(mass, own)[given], kl(own, mass)[~given]
    assert output.off_policy_loss.item() == pytest.approx(off.mean().item(), rel=1e-4)
    assert output.on_policy_loss.item() == pytest.approx(on.mean().item(), rel=1e-4)


def test_what_a_teacher_with_another_tokenizer_reads(tmp_path: Path) -> None:
    trainer = make(tmp_path, other=True, **GIVEN)
    batch, _ = step(trainer)
    own, other = trainer.processing_class, trainer.bridge.tokenizer
    for (ids, mask), (seen, seen_mask) in zip(
        sequences(batch.student), sequences(batch.lesson.seen), strict=True
    ):
        given, heard = (
            tokenizer.decode(row[1:][picked[:-1]], skip_special_tokens=True)
            for tokenizer, row, picked in ((own, ids, mask), (other, seen, seen_mask))
        )
        assert given == heard
        prompt = other.decode(seen[: len(seen) - int(seen_mask.sum())])
        assert prompt.startswith("[user] Translate from") and prompt.endswith("[assistant] ")


def test_training_with_another_tokenizer_and_resuming(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "other": True,
    }
    make(tmp_path / "whole", **settings).train()
    trainer = make(tmp_path / "cut", **settings)
    trainer.train()
    assert "map" in trainer._identity and trainer._identity["map"] is not None
    lines = tiny.logged(tmp_path / "whole")
    for line in lines:
        assert 0 < line["paired_rows"] < 1 and line["unpaired_responses"] == 0
        assert line["teacher_entropy"] > 0
    (tmp_path / "cut" / "checkpoint-4").rename(tmp_path / "aside")
    again = make(tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=True)
    resumed = tiny.logged(tmp_path / "cut")
    assert resumed == lines
    same = make(tmp_path / "cut", **(settings | {"other": False}))
    with pytest.raises(ValueError, match="the map between the vocabularies is another"):
        same.train(resume_from_checkpoint=True)


def test_evaluation_is_over_rows_that_pair(tmp_path: Path) -> None:
    trainer = make(tmp_path, other=True)
    rows = trainer._prepare(tiny.rows(6), trainer.processing_class, trainer.args, "eval")
    result = evaluate_model(
        trainer.model,
        trainer.processing_class,
        rows,
        teacher=trainer.teacher,
        bridge=trainer.bridge,
        generate=False,
    )
    assert result.mean["kl_to_teacher"] > 0 and result.mean["nll_per_token"] > 0
    alone = evaluate_model(trainer.model, trainer.processing_class, rows, generate=False)
    assert alone.mean["nll_per_token"] == pytest.approx(result.mean["nll_per_token"], rel=1e-5)
    with pytest.raises(ValueError, match="teacher must share the model's vocabulary"):
        evaluate_model(
            trainer.model, trainer.processing_class, rows, teacher=trainer.teacher, generate=False
        )


def test_padded_heads_need_no_equal_sizes(tmp_path: Path) -> None:
    """Rows that only the teacher's head has are left out; so are those of the student's."""
    found = []
    for more in (0, 64):
        torch.manual_seed(0)
        teacher = tiny.model(1)
        teacher.resize_token_embeddings(tiny.VOCAB + more, mean_resizing=False)
        trainer = DuDiTrainer(
            tiny.model(0),
            teacher,
            args=tiny.config(tmp_path / str(more), **GIVEN),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
            teacher_processing_class=tiny.tokenizer(),
        )
        assert (trainer.bridge.verbalizer is None) == (more == 0)
        assert trainer.bridge.pairing is None and not trainer.bridge.maps_tokens
        found.append(step(trainer)[1].off_policy_loss.item())
    assert found[0] == found[1]


# ---- what is left out, and weighed ---------------------------------------------------------------


def test_first_tokens_can_be_left_out(tmp_path: Path) -> None:
    every, fewer = (step(make(tmp_path, **GIVEN, teacher_skip_tokens=k)) for k in (0, 2))
    counted = torch.cat([torch.arange(len(r[1].nonzero())) for r in sequences(every[0].student)])
    want = every[1].divergence[counted >= 2].mean()
    assert fewer[1].off_policy_loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_confidence_gating_weighs_rows_of_given_responses(tmp_path: Path) -> None:
    trainer = make(tmp_path, confidence_gating=0.5)
    batch, output = step(trainer)
    targets, given = batch.lesson.seen.targets[:, None], batch.student.segment_ids % 2 == 0
    assert torch.equal(batch.lesson.plain.targets[:, None], targets[given])  # y- are not gated
    says = [
        log_probs(trainer.teacher, packed).gather(1, packed.targets[:, None])[:, 0]
        for packed in (batch.lesson.seen, batch.lesson.plain)
    ]
    gate = torch.ones(len(given), dtype=torch.float64)
    gate[given] = (0.5 * (says[0][given] - says[1]).clamp(max=0)).exp()
    q = log_probs(trainer.model, batch.student).exp()
    p = log_probs(trainer.teacher, batch.lesson.seen).exp()
    off, on = (gate * kl(p, q))[given].mean(), kl(q, p)[~given].mean()
    assert output.off_policy_loss.item() == pytest.approx(off.item(), rel=1e-4)
    assert output.on_policy_loss.item() == pytest.approx(on.item(), rel=1e-4)
    logged = trainer.meter.drain(trainer.accelerator)
    assert logged["confidence_gate"] == pytest.approx(gate[given].mean().item(), rel=1e-4)
    assert 0 < logged["confidence_gate"] < 1


def test_confidence_of_the_impossible() -> None:
    inf = torch.inf
    says = torch.tensor([-1.0, -inf, -inf, -2.0]), torch.tensor([-2.0, -1.0, -inf, -1.0])
    want = torch.tensor([1.0, 0.0, 1.0, torch.e**-3])
    assert torch.allclose(confidence(*says, 3.0), want)


def test_plain_and_verbalized_teacher_are_mixed(tmp_path: Path) -> None:
    trainer = make(tmp_path, **GIVEN, verbalized_share=0.3)
    batch, output = step(trainer)
    seen, plain = (log_probs(trainer.teacher, part) for part in batch.lesson[:2])
    p = (0.3 * seen + 0.7 * plain).softmax(-1)
    q = log_probs(trainer.model, batch.student).exp()
    assert output.off_policy_loss.item() == pytest.approx(kl(p, q).mean().item(), rel=1e-4)


@pytest.mark.parametrize("other", [False, True])
def test_sharpening(tmp_path: Path, other: bool) -> None:
    trainer = make(
        tmp_path,
        other=other,
        **GIVEN,
        teacher_temperature=0.5,
        teacher_top_p=0.6,
        unmatched="bucket",
    )
    batch, output = step(trainer)
    p = (log_probs(trainer.teacher, batch.lesson.seen) / 0.5).softmax(-1)
    top = p.sort(-1, descending=True)
    kept = (top.values.cumsum(-1) - top.values < 0.6).sum(-1, keepdim=True)
    edge = top.values.gather(1, kept - 1)
    p = torch.where(p >= edge, p, 0)[batch.lesson.teacher_rows]
    p = p / p.sum(-1, keepdim=True)
    q = log_probs(trainer.model, batch.student).exp()[batch.lesson.student_rows]
    if other:
        p, q = classes(trainer.bridge.verbalizer, p, q)
    want = kl(p.clamp(min=1e-30), q).mean().item()
    assert output.off_policy_loss.item() == pytest.approx(want, rel=1e-4)


# ---- what the teacher reads ----------------------------------------------------------------------


def test_templates_show_what_the_student_has_just_written(tmp_path: Path) -> None:
    templates = dict.fromkeys(("en", "id", "ms", "vi", "th"), "Try: <{{ student_completion }}>")
    templates |= dict.fromkeys(("fil", "my", "km", "lo", "ta"), templates["en"])
    trainer = make(tmp_path, verbalizer_templates=templates)
    batch, _ = step(trainer)
    decode = trainer.processing_class.decode
    for i, (seen, mask) in enumerate(sequences(batch.lesson.seen)):
        prompt = decode(seen[: int(mask.nonzero()[0]) + 1])
        written = decode(batch.drawn.completions[i // 2], skip_special_tokens=True)
        assert f"Try: <{written}>" in prompt
    with pytest.raises(ValueError, match="student_completion, but no samples are drawn"):
        make(tmp_path, verbalizer_templates=templates, on_policy_weight=0.0)


def test_a_chain_of_turns(tmp_path: Path) -> None:
    chain = [
        {"user": "{{ pivot_prompt or '' }}"},
        {"assistant": "ok"},
        {"user": "{{ template }}"},
    ]
    trainer = make(tmp_path, **GIVEN, verbalizer_chain=chain)
    batch, _ = step(trainer)
    seen, _ = sequences(batch.lesson.seen)[0]
    text = trainer.processing_class.decode(seen)
    assert text.count("<|user|>") == 2 and "<|assistant|>ok<|end|><|user|>Translate" in text


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "teacher", "preference_weight": 1.0}, "reference must not be 'teacher'"),
        ({"vocabulary_verbalizer": False}, "vocabulary_verbalizer must not be false: .*tokenizer"),
        ({"vocabulary_verbalizer": "no.safetensors"}, "vocabulary_verbalizer .* does not exist"),
        ({"gradient_tolerance": 0.01}, "gradient_tolerance must be 0"),
        ({"teacher_top_p": 0.5}, "on_policy_divergence"),
        (
            {"context_verbalizer": False, "verbalized_share": 0.5},
            "verbalized_share < 1 and confidence_gating > 0 need the context verbalizer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, other=True, **settings)


def test_a_saved_map_must_be_of_these_tokenizers_and_heads(tmp_path: Path) -> None:
    own, other, path = tiny.tokenizer(), teacher_tokenizer(), tmp_path / "map.safetensors"
    size = len(other)
    Verbalizer.from_tokenizers(other, own, teacher_size=size, student_size=tiny.VOCAB).save(path)
    trainer = make(tmp_path, other=True, vocabulary_verbalizer=str(path))
    assert trainer.bridge.fingerprint == make(tmp_path, other=True).bridge.fingerprint
    with pytest.raises(ValueError, match=r"teacher_tokenizer must be the one .* has changed"):
        make(tmp_path, vocabulary_verbalizer=str(path))
    Verbalizer.from_tokenizers(other, own, teacher_size=size, student_size=tiny.VOCAB + 1).save(
        path
    )
    with pytest.raises(ValueError, match=f"student's head of {tiny.VOCAB} rows"):
        make(tmp_path, other=True, vocabulary_verbalizer=str(path))


def normalizing() -> Any:
    from tokenizers import normalizers

    tokenizer = vocabularies.byte_level()
    tokenizer._tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def test_responses_that_a_tokenizer_changes_are_counted_warned_of_and_refused(
    tmp_path: Path,
) -> None:
    text = [item["vi"] for item in ui_strings()][:20]
    rows = [{"prompt": "p", "completion": t.replace("é", "e")} for t in text]
    rows[3]["completion"] = "cafe\u0301"
    rows = [row for row in rows if row["completion"]]
    teacher = normalizing()

    def trainer(**settings: Any) -> DuDiTrainer:
        return DuDiTrainer(
            tiny.model(0),
            tiny.model(1, vocab=len(teacher)),
            args=tiny.config(tmp_path, **(GIVEN | settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny.tokenizer(),
            teacher_processing_class=teacher,
        )

    with pytest.warns(UserWarning, match=r"changes the bytes of 1 of .* row 3 is the first"):
        made = trainer()
    assert made.data_counts["train"]["unpaired_responses"] == 1
    made.train()
    with pytest.raises(ValueError, match=r"more than max_unpaired=0\.0 allows"):
        trainer(max_unpaired=0.0)
