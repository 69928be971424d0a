"""Tasks' figures against dense, row by row computations in float64 that share no code with them."""

from __future__ import annotations

import io
import json
import math
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dudi import cli
from dudi.demo_data import translation_rows
from dudi.evaluation import Task, TaskResult, choices, evaluate_tasks, load_result, writing
from dudi.evaluation.calibration import spread
from dudi.evaluation.command import run_evaluation
from dudi.evaluation.encoding import Encoder
from dudi.evaluation.items import Item
from dudi.evaluation.scoring import Scorer
from dudi.evaluation.tables import show_result
from dudi.rollout import Rollout

LANGUAGES = ["en", "th"]


def sharpened(seed: int, **settings: Any) -> Any:
    """A tiny model whose predictions are far from uniform."""
    model = tiny.model(seed, **settings)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def translation(limit: int = 5, **fields: Any) -> Task:
    return Task.model_validate(
        {
            "name": "translation",
            "source": {"builtin": "ui_strings"},
            "language": "{{ language }}",
            "chat": True,
            "prompt": "{{ instruction }}",
            "completion": "{{ reference }}",
            "rows": {"limit": limit},
        }
        | fields
    )


def asked(limit: int = 5) -> list[dict[str, Any]]:
    """The same rows, read by hand."""
    rows = translation_rows("test")
    by_language = {
        code: [row for row in rows if row["language"] == code][:limit] for code in LANGUAGES
    }
    return [row for own in by_language.values() for row in own]


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def log_probs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """(R, V) by the model's own dense forward, in float64."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def prompt_and_answer(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    text = row["completion"][0]["content"]
    return ids(f"<|user|>{row['prompt'][0]['content']}<|end|><|assistant|>"), ids(f"{text}<|end|>")


@torch.no_grad()
def dense(model: Any, teacher: Any, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures by language; ECE by a loop over predictions."""
    found = {}
    for code in LANGUAGES:
        own = [row for row in rows if row["language"] == code]
        nll = kl = 0.0
        predictions, count, chars, size = [], 0, 0, 0
        for row in own:
            prompt, answer = prompt_and_answer(row)
            lq, lp = log_probs(model, prompt, answer), log_probs(teacher, prompt, answer)
            nll -= sum(lq[i, token].item() for i, token in enumerate(answer))
            kl += (lp.exp() * (lp - lq)).sum().item()
            most, which = lq.exp().max(-1)
            predictions += [
                (p.item(), w.item() == a) for p, w, a in zip(most, which, answer, strict=True)
            ]
            count += len(answer)
            chars += len(row["completion"][0]["content"])
            size += len(row["completion"][0]["content"].encode())
        found[code] = {
            "nll_per_token": nll / count, "nll_per_char": nll / chars, "nll_per_byte": nll / size,
            "kl_to_teacher": kl / count, "ece_tokens": calibration_error(predictions),
        }  # fmt: skip
    return found


def calibration_error(predictions: list[tuple[float, bool]], bins: int = 15) -> float:
    total = 0.0
    for b in range(bins):
        own = [
            (p, right)
            for p, right in predictions
            if b / bins <= p < (b + 1) / bins or (p == 1 and b == bins - 1)
        ]
        if own:
            sure = sum(p for p, _ in own) / len(own)
            hit = sum(right for _, right in own) / len(own)
            total += len(own) / len(predictions) * abs(sure - hit)
    return total


METRICS: dict[str, Any] = {"metrics": ["nll", "kl", "calibration"]}


@pytest.mark.parametrize(("batch_size", "padding_free"), [(1, False), (4, True), (16, False)])
def test_likelihoods(batch_size: int, padding_free: bool) -> None:
    model, teacher = sharpened(0), sharpened(1)
    rows = asked()
    expected = dense(model, teacher, rows)
    for m in (model, teacher):
        m.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits were made"))
    result = evaluate_tasks(
        model, tiny.tokenizer(), [translation(**METRICS)], teacher=teacher, languages=LANGUAGES,
        batch_size=batch_size, padding_free=padding_free, resamples=50,
    )  # fmt: skip
    task = result.tasks["translation"]
    assert task.languages == LANGUAGES and len(task.rows) == len(rows)
    for code, values in expected.items():
        for figure, value in values.items():
            assert task.value(figure, code) == pytest.approx(value, rel=1e-4), (code, figure)
    for figure in expected["en"]:
        mean = sum(own[figure] for own in expected.values()) / len(expected)
        low, high = task.estimate(figure)[1:]
        assert task.value(figure) == pytest.approx(mean, rel=1e-4) and low < high
    assert math.isnan(task.value("accuracy")) and not task.samples
    with pytest.raises(ValueError, match=r"figure must be one of nll_per_char.*got 'bleu'"):
        task.value("bleu")


class Rounded(nn.Module):
    """A linear layer kept in int8, as a quantised body has."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.whole = (linear.weight / self.scale).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.whole * self.scale).T


@torch.no_grad()
def test_quantised_bodies_and_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    rows, task = asked(2), translation(2, **METRICS)
    quantised = sharpened(0)
    for layer in quantised.model.layers:
        layer.mlp.up_proj = Rounded(layer.mlp.up_proj)
    adapter = get_peft_model(
        sharpened(0, tied=False), LoraConfig(target_modules=["q_proj", "lm_head"])
    )
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    for model in (quantised, adapter):
        expected = dense(model.eval(), model, rows)
        own = evaluate_tasks(
            model, tiny.tokenizer(), [task], languages=LANGUAGES, resamples=1
        ).tasks["translation"]
        assert own.value("nll_per_char", "th") == pytest.approx(
            expected["th"]["nll_per_char"], rel=1e-4
        )
        assert "kl_to_teacher" not in own.figures  # no teacher


@torch.no_grad()
def test_no_logits_in_memory() -> None:
    """Whatever is asked for: no block of (N, V) numbers, by torch's own profiler."""
    model, teacher, budget = tiny.model(0), tiny.model(1), 4_000_000
    rows = [{name: [5] * 64 for name in ("prompt_ids", "plain_prompt_ids", "completion_ids")}] * 8
    scorer = Scorer(model, 0, teacher, memory_budget=budget)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        scorer.score(rows, confidences=True)
    assert run.profiler is not None
    sizes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(sizes) < 512 * tiny.VOCAB * 4 / 8


def questions(path: Path, **fields: Any) -> Path:
    """A user's own task beside its data."""
    rows = [
        {"q": "Call forwarding", "options": ["on", "turned off", "x y z"], "right": "turned off"},
        {"q": "Battery", "options": ["full", "low", "gone"], "right": "full"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "items.jsonl").write_text(text, encoding="utf-8")
    content = {
        "name": "own", "source": {"file": "items.jsonl"}, "language": "en",
        "prompt": "{{ q }} is", "choices": "options", "answer": "right",
    } | fields  # fmt: skip
    (path / "own.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path / "own.yaml"


@torch.no_grad()
def test_choices(tmp_path: Path) -> None:
    model = sharpened(2)
    # choices are scored whole, whatever generations may have
    task = evaluate_tasks(
        model, tiny.tokenizer(), [questions(tmp_path)], batch_size=2, max_completion_length=1
    ).tasks["own"]
    right, by_bytes, predictions = [], [], []
    for line in (tmp_path / "items.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = ids(row["q"] + " is")
        sums = torch.tensor(
            [
                sum(log_probs(model, prompt, ids(o))[i, t].item() for i, t in enumerate(ids(o)))
                for o in row["options"]
            ]
        )
        sizes = torch.tensor([len(o) for o in row["options"]])
        answer = row["options"].index(row["right"])
        right.append(int(sums.argmax()) == answer)
        by_bytes.append(int((sums / sizes).argmax()) == answer)
        predictions.append((sums.softmax(0).max().item(), right[-1]))
    assert task.value("accuracy", "en") == sum(right) / 2
    assert task.value("accuracy_by_bytes", "en") == sum(by_bytes) / 2
    assert task.value("ece_choices", "en") == pytest.approx(
        calibration_error(predictions), rel=1e-4
    )
    assert right != by_bytes  # or the two could be one


def parrot(say: Any) -> Any:
    def generate(model: Any, prompts: list[Tensor], **settings: Any) -> Rollout:
        assert settings["temperature"] == 0
        said = [say(p.tolist())[: settings["max_completion_length"]] for p in prompts]
        reasons = ["eos" if own[-1] == 1 else "length" for own in said]
        return Rollout([torch.tensor(own) for own in said], reasons)

    return generate


def test_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """chrF++ is sacrebleu's own of the corpus; the first rows are generated; silence is no Thai."""
    known = {tuple(prompt_and_answer(row)[0]): row for row in asked(4)}

    def say(prompt: list[int]) -> list[int]:
        row = known[tuple(prompt)]
        answer = prompt_and_answer(row)[1]
        return [1] if row["language"] == "th" else [*answer[: len(answer) // 2], 1]

    monkeypatch.setattr(writing, "generate", parrot(say))
    task = translation(4, metrics=["chrf", "length_ratio", "fidelity"])
    own = evaluate_tasks(
        tiny.model(), tiny.tokenizer(), [task], languages=LANGUAGES, generate_rows=3, batch_size=2
    ).tasks["translation"]
    assert len(own.samples) == 6 and len(own.rows) == 8 and "nll_per_char" not in own.figures
    for code in LANGUAGES:
        written = [s for s in own.samples if s["language"] == code]
        texts, references = ([s[k] for s in written] for k in ("generation", "reference"))
        expected = CHRF(word_order=2).corpus_score(texts, [references]).score
        assert own.value("chrf++", code) == pytest.approx(expected)
        lengths = sum(map(len, texts)) / sum(map(len, references))
        assert own.value("length_ratio", code) == pytest.approx(lengths, abs=0.05)
    assert own.value("fidelity", "th") == 0 and own.value("fidelity_of_references", "th") == 1
    assert 0 < own.value("chrf++", "en") < 100


def test_what_the_limits_cut_is_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: rows whose prompt, reference or generation has more tokens than its limit."""
    known = {tuple(prompt_and_answer(row)[0]): prompt_and_answer(row)[1] for row in asked(4)}
    lengths: dict[str, list[tuple[int, ...]]] = {code: [] for code in LANGUAGES}
    for row in asked(4):
        lengths[row["language"]].append(tuple(map(len, prompt_and_answer(row))))
    limits = [sorted(n[place] for own in lengths.values() for n in own)[3] for place in (0, 1)]
    screen, model = io.StringIO(), tiny.model()
    said = iter(known.values())
    monkeypatch.setattr(writing, "generate", parrot(lambda prompt: next(said)))
    result = evaluate_tasks(
        model, tiny.tokenizer(), [translation(4)], languages=LANGUAGES, resamples=1,
        batch_size=1, max_prompt_length=limits[0], max_completion_length=limits[1],
    )  # fmt: skip
    read = load_result(result.save(tmp_path / "tasks.json")).to_dict()
    cut = read["tasks"]["translation"]["cuts"]
    for what, place, limit in (("prompts", 0, limits[0]), ("references", 1, limits[1])):
        for code, own in lengths.items():
            over = sum(sizes[place] > limit for sizes in own)
            assert cut[what][code] == {"cut": over, "of": 4}
        assert 0 < sum(n["cut"] for n in cut[what].values()) < 8  # or it could be all of them
    over = sum(len(answer) > limits[1] for answer in known.values())
    assert sum(n["cut"] for n in cut["generations"].values()) == over
    assert "teacher_prompts" not in cut
    show_result(result, Console(file=screen, width=80))
    told = screen.getvalue()
    count = sum(n["cut"] for n in cut["prompts"].values())
    assert f"translation: {count} of 8 prompts were cut to max_prompt_length {limits[0]} (" in told
    assert f"{over} of 8 generations had no end within max_completion_length {limits[1]}" in told
    assert "likelihoods are of their beginnings, chrF++ and length ratio of the whole" in told
    whole = evaluate_tasks(
        model, tiny.tokenizer(), [translation(4, **METRICS)], languages=LANGUAGES, resamples=1
    )
    assert whole.cuts("translation") == []


def test_cut_prompts_of_choices_and_of_the_teacher(tmp_path: Path) -> None:
    model, tokenizer = sharpened(2), tiny.tokenizer()
    own = evaluate_tasks(model, tokenizer, [questions(tmp_path)], max_prompt_length=2, resamples=1)
    sizes = [len(ids(f"{q} is")) for q in ("Call forwarding", "Battery")]
    assert [row["prompt_left_out"] for row in own.tasks["own"].rows] == [n - 2 for n in sizes]
    encoder = Encoder.of(tokenizer, copy(tokenizer), max_prompt_length=4)
    left = encoder.row("one two three four five", "x", chat=False, ends=True)["left_out"]
    assert left["teacher_prompt_left_out"] == left["prompt_left_out"] > 0
    assert "teacher_prompt_left_out" not in Encoder.of(tokenizer).row(
        "one", "x", chat=False, ends=True
    )["left_out"]  # fmt: skip


def spoil(body: nn.Module, token: int) -> None:
    """Make hidden states NaN where a row has this token."""

    def hook(body: nn.Module, given: Any, named: dict[str, Any], out: Any) -> None:
        bad = (named["input_ids"] == token).any(-1)
        out.last_hidden_state.masked_fill_(bad[:, None, None], math.nan)

    body.register_forward_hook(hook, with_kwargs=True)


def test_likelihoods_that_are_not_finite_are_told(tmp_path: Path) -> None:
    """Of Thai alone; the file is JSON, and reads as it was written."""
    model = sharpened(0)
    rows = asked(2)
    thai = prompt_and_answer(rows[-1])[1]
    others = {t for row in rows[:-1] for part in prompt_and_answer(row) for t in part}
    spoil(model.model, next(token for token in thai if token not in others))
    task = translation(2, metrics=["nll", "calibration"])
    result = evaluate_tasks(
        model, tiny.tokenizer(), [task], languages=LANGUAGES, resamples=5, batch_size=1
    )
    own = result.tasks["translation"]
    assert own.notes == ["likelihoods of 1 rows are not finite (th 1): nothing is told of them"]
    for figure in ("nll_per_char", "ece_tokens"):
        assert math.isnan(own.value(figure, "th")) and math.isnan(own.value(figure))
        assert own.value(figure, "en") > 0
    read = load_result(result.save(tmp_path / "tasks.json"))
    assert read.to_dict() == result.to_dict()


def test_choices_that_are_not_finite_alike_or_impossible() -> None:
    item = Item(0, "en", "0", "q", "", ("a", "bb", "a"), 2)
    says = [[-3.0, -4.0, -3.0], [-3.0, -math.inf, -3.0], [math.nan, -1.0, -3.0], [-math.inf] * 3]
    values = [choices._values(item, torch.tensor(own, dtype=torch.float64)) for own in says]
    assert [own["correct"] for own in values] == [1, 1, None, None]  # the same text is as right
    assert values[1]["log_probs"] == [-3, None, -3] and values[3]["chosen"] is None
    json.dumps(values, allow_nan=False)
    assert math.isnan(spread(values[2]["choice_bins"]).sum())


def test_ends_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may end a turn with a token of its own before EOS: `ends: false` leaves out both,
    and a generation ends there if the model's generation_config says so."""
    tokenizer = copy(tiny.tokenizer())
    (turn,) = ids("<|user|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>"
        "{% else %}{{ m.content }}<|user|>\n{% endif %}{% endfor %}"
    )
    encoder = Encoder.of(tokenizer)
    whole = encoder.row("Hi", "Hello world", chat=True, ends=True)["completion_ids"]
    own = encoder.row("Hi", "Hello world", chat=True, ends=False)["completion_ids"]
    assert own == ids("Hello world") and whole == [*own, turn, *ids("\n"), 1]
    model, asked_for = tiny.model(), {}

    def generate(model: Any, prompts: list[Tensor], **settings: Any) -> Rollout:
        asked_for.update(settings)
        return Rollout([torch.tensor([turn])] * len(prompts), ["eos"] * len(prompts))

    monkeypatch.setattr(writing, "generate", generate)
    model.generation_config.eos_token_id = [1, turn]
    evaluate_tasks(
        model, tokenizer, [translation(1, metrics=["chrf"])], languages=["th"], resamples=1
    )
    assert asked_for["eos_token_id"] == sorted([1, turn])


def test_texts_without_prompts_or_ends(tmp_path: Path) -> None:
    """An empty prompt is the tokenizer's EOS where it has no BOS; `ends: false` leaves it out."""
    (tmp_path / "text.jsonl").write_text('{"text": "Hello world"}\n', encoding="utf-8")
    fields = {
        "name": "text", "source": {"file": str(tmp_path / "text.jsonl")},
        "completion": "{{ text }}", "metrics": ["nll"],
    }  # fmt: skip
    model, answer = sharpened(0), ids("Hello world")
    with torch.no_grad():
        lq = log_probs(model, [1], [*answer, 1])
    nll = [-lq[i, token].item() for i, token in enumerate([*answer, 1])]
    for ends, expected in ((True, sum(nll)), (False, sum(nll[:-1]))):
        task = Task.model_validate(fields | {"ends": ends})
        own = evaluate_tasks(model, tiny.tokenizer(), [task], resamples=1).tasks["text"]
        (row,) = own.rows
        assert row["nll"] == pytest.approx(expected, rel=1e-4)
        assert (row["language"], row["chars"], row["tokens"]) == ("all", 11, len(answer) + ends)


def test_absent_data_is_skipped_with_the_reason(tmp_path: Path) -> None:
    screen = io.StringIO()
    tiny.model().save_pretrained(tmp_path / "run" / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "run" / "model")
    result = run_evaluation(
        str(tmp_path / "run" / "model"), tasks=["udhr", translation(1, **METRICS)],
        data_dir=str(tmp_path), languages=["th"], output=tmp_path / "run" / "tasks.json",
        console=Console(file=screen, width=120),
    )  # fmt: skip
    assert "udhr.jsonl is not there: `dudi eval-data` fetches it" in result.skipped["udhr"]
    assert "udhr was skipped" in screen.getvalue() and "NLL / char" in screen.getvalue()
    read = load_result(tmp_path / "run")
    assert (read.name, read.skipped) == ("run", result.skipped)
    own: TaskResult = read.tasks["translation"]
    assert own.figures == result.tasks["translation"].figures
    assert read.to_dict() == json.loads((tmp_path / "run" / "tasks.json").read_text())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_language_without_rows_is_told() -> None:
    own = evaluate_tasks(
        tiny.model(0), tiny.tokenizer(), [translation(1, metrics=["nll"])], languages=["th", "jv"]
    ).tasks["translation"]
    assert (own.languages, own.notes) == (["th"], ["there are no rows in jv"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"generate_rows": -1}, "generate_rows must be at least 0, got -1"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"max_prompt_length": -3}, "max_prompt_length must be at least 1, got -3"),
        ({"tasks": []}, "tasks must not be empty"),
        ({"tasks": ["udhr", "udhr"]}, "different names, got 'udhr' twice"),
        ({"tasks": ["nowhere"]}, "YAML file or one of mediawiki, .*got 'nowhere'"),
        ({"teacher": 99}, "teacher must share the model's vocabulary of 16384, got 99"),
        ({"model": 99}, "task translation must hold ids of the model's vocabulary of 99, got"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    for name in {"model", "teacher"} & change.keys():
        change = {name: tiny.model(vocab=change[name])}
    arguments = {"model": tiny.model(), "tasks": [translation(1, **METRICS)], **change}
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(tokenizer=tiny.tokenizer(), **arguments)


def test_bad_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tasks.json"
    for text, message in (
        ("{", "must hold JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"format": 9}', "with format 1, got format 9"),
        ('{"format": 1, "tasks": {}}', "it lacks 'name'"),
    ):
        path.write_text(text, encoding="utf-8")
        assert cli.main(["compare", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and "tasks.json" in error
