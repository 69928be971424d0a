"""`dudi verbalize`: its figures beside dense float64, its page, the command as a user meets it."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vocabularies
from datasets import Dataset
from test_teaching import GIVEN, make

from dudi import cli
from dudi.demo_data import translation_rows
from dudi.inspection import render, summarise
from dudi.inspection_figures import REST, Speller, choose_rows, inspect_rows

TWO = {"other": True, **GIVEN}


def few(count: int = 4) -> Dataset:
    return tiny.rows(count)


@torch.no_grad()
def says(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """(R, U) what a model says about each token of a response, in float64."""
    logits = model.double()(torch.tensor([prompt + response])).logits[0]
    model.float()
    return logits[len(prompt) - 1 : -1].softmax(-1)


def likeliest(p: torch.Tensor, count: int) -> list[float]:
    return p.sort(descending=True).values[:count].tolist()


def shares(said: list[tuple[str, float]]) -> list[float]:
    return [p for _, p in said]


# ---- figures -------------------------------------------------------------------------------------


def test_figures_of_one_tokenizer_equal_dense_formulas(tmp_path: Path) -> None:
    settings = {"confidence_gating": 0.5, "teacher_skip_tokens": 1, "verbalized_share": 0.3}
    trainer = make(tmp_path, rows=few(), **GIVEN, **settings, teacher_temperature=2.0)
    for shown, row in zip(inspect_rows(trainer, 4), trainer.train_dataset, strict=True):
        ids, prompts = row["completion_ids"], (row["teacher_prompt_ids"], row["plain_prompt_ids"])
        verbalized, plain = (says(trainer.teacher, prompt, ids) for prompt in prompts)
        assert shown.teacher_prompt_ids == prompts[0] and shown.paired == 1
        mixed = verbalized**0.15 * plain**0.35  # (p^0.3 p'^0.7)^(1 / 2)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        for i, (token, own) in enumerate(zip(shown.tokens, ids, strict=True)):
            assert token.token == token.partner == trainer.processing_class.decode([own])
            assert shares(token.verbalized) == pytest.approx(likeliest(verbalized[i], 4), rel=1e-4)
            assert shares(token.plain) == pytest.approx(likeliest(plain[i], 4), rel=1e-4)
            assert shares(token.learnt) == pytest.approx(likeliest(mixed[i], 4), rel=1e-4)
            kl = (verbalized[i] * (verbalized[i] / plain[i]).log()).sum().item()
            assert token.divergence == pytest.approx(kl, rel=1e-3, abs=1e-7)
            gate = min(1.0, (verbalized[i, own] / plain[i, own]).item()) ** 0.5
            assert token.weight == pytest.approx(gate if i else 0.0, rel=1e-4)


@pytest.mark.parametrize("unmatched", ["bucket", "renormalize"])
def test_figures_of_two_tokenizers_equal_dense_formulas(tmp_path: Path, unmatched: str) -> None:
    rows = tiny.rows(40).select([0, 19, 35])  # the last ones in scripts that the teacher cuts
    settings = {"unmatched": unmatched, "teacher_top_p": 0.6, "max_completion_length": 64}
    trainer = make(tmp_path, rows=rows, **TWO, **settings)
    own, other, map_ = trainer.processing_class, trainer.bridge.tokenizer, trainer.bridge.verbalizer
    assert map_ is not None
    dense = torch.zeros(map_.teacher_size, map_.num_classes, dtype=torch.float64)
    dense[map_.teacher_ids, map_.entry_class] = map_.weights.double()
    for shown, row in zip(inspect_rows(trainer), trainer.train_dataset, strict=True):
        texts = other(own.decode(row["completion_ids"][:-1]))["input_ids"]
        p = says(trainer.teacher, row["teacher_prompt_ids"], [*texts, other.eos_token_id])
        ends, j = [other.decode(texts[:i]) for i in range(len(texts) + 1)], -1
        for i, token in enumerate(shown.tokens):
            if token.partner is None:
                assert token.weight == 0 and not token.learnt and token.divergence is None
                continue
            read = own.decode(row["completion_ids"][:i])
            j = next(k for k in range(j + 1, len(ends)) if ends[k] == read)  # the same text before
            ordered = p[j].sort(descending=True)
            kept = int((ordered.values.cumsum(0) - ordered.values < 0.6).sum())
            nucleus = torch.zeros_like(p[j])
            nucleus[ordered.indices[:kept]] = ordered.values[:kept] / ordered.values[:kept].sum()
            mass = nucleus @ dense
            if unmatched == "renormalize":
                mass = mass / mass.sum()
            rest = 1 - mass.sum()
            want = likeliest(torch.cat([mass, rest[None]]), len(token.learnt))
            assert shares(token.learnt) == pytest.approx(want, rel=1e-3)
            assert shares(token.verbalized) == pytest.approx(likeliest(p[j], 5), rel=1e-4)
        assert shown.paired > 0 and shown.tokens[-1].partner == other.eos_token


def test_what_has_no_token_of_the_student_s_is_told(tmp_path: Path) -> None:
    trainer = make(tmp_path, rows=few(2), **TWO)
    with torch.no_grad():  # the teacher says what only it has a token for
        head, tool = trainer.teacher.lm_head.weight, trainer.bridge.tokenizer("<|tool|>").input_ids
        head.requires_grad_(False)[tool[0]] = 0
        trainer.teacher.model.norm.weight.zero_()  # all tokens alike
    learnt = inspect_rows(trainer, 16_385)[0].tokens[0].learnt
    share = 1 / len(trainer.bridge.tokenizer)
    assert dict(learnt)[REST] == pytest.approx(share, rel=1e-3)
    assert sum(shares(learnt)) == pytest.approx(1)


def test_tokens_that_cut_a_character_show_its_bytes() -> None:
    spell = Speller(vocabularies.byte_level(["ก", " x"]))
    tokens = [i for text in ("ก", " x", "\n", "ข") for i in spell.tokenizer(text)["input_ids"]]
    assert [spell(i) for i in tokens] == ["ก", " x", "⏎", "\\xe0", "\\xb8", "\\x82"]
    marks = Speller(vocabularies.byte_level(["\u0e35", "  "]))
    shown = [marks(marks.tokenizer(text)["input_ids"][0]) for text in ("\u0e35", "  ")]
    assert shown == ["◌\u0e35", "␣␣"]
    assert spell(spell.tokenizer.eos_token_id) == "<|im_end|>"
    assert spell(99_999) == "99999"  # a padded head's


def test_templates_that_show_a_sample_get_a_greedy_one(tmp_path: Path) -> None:
    languages = ("en", "id", "ms", "vi", "th", "fil", "my", "km", "lo", "ta")
    templates = dict.fromkeys(languages, "{{ prompt }} Try: <{{ student_completion }}>")
    trainer = make(tmp_path, rows=few(2), verbalizer_templates=templates)
    for shown, row in zip(inspect_rows(trainer), trainer.train_dataset, strict=True):
        sample = trainer.greedy_sample(torch.tensor(row["prompt_ids"])).completions[0]
        text = trainer.processing_class.decode(sample, skip_special_tokens=True)
        assert f"Try: <{text}>" in shown.teacher_prompt


def test_first_rows_of_each_language() -> None:
    rows = [{"language": code} for code in ("th", "vi", "th", "th", "vi", "km")]
    assert choose_rows(Dataset.from_list(rows), 2) == [0, 1, 2, 4, 5]
    assert choose_rows(Dataset.from_list([{"prompt": "p"}] * 3), 2) == [0, 1]


def test_the_page_has_every_token_and_escapes_it(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"prompt": "say <b>", "completion": "<script>1</script> & \n ไม่มีบริการ", "language": "th"}]
    )
    shown = inspect_rows(make(tmp_path, rows=rows, context_verbalizer=True, **GIVEN))
    about = {"student": "a", "teacher": "b", "vocabulary": None, "refinement": {"x": 1}}
    page = render(shown, about)
    assert "<script" not in page and "http" not in page
    cells = [unescape(c) for c in re.findall(r'<td class="token">(.*?)</td>', page, re.S)]
    assert cells[::2] == [t.token for t in shown[0].tokens]
    assert [line.language for line in summarise(shown)] == ["th"]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A student, teachers of both kinds and rows in several languages."""
    tiny.model(0).save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    tiny.model(1).save_pretrained(tmp_path / "same")
    tiny.tokenizer().save_pretrained(tmp_path / "same")
    other = vocabularies.trained_byte_level()
    tiny.model(1, vocab=len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    rows = [row for row in translation_rows("train")[:200] if row["language"] in ("th", "km", "my")]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path}/student\n"
        f"teacher_model_name_or_path: {tmp_path}/same\n"
        f"dataset_name: {tmp_path}/data.jsonl\n"
        f"output_dir: {tmp_path}/run\n"
        "dataset_test_split: train\neval_strategy: steps\neval_steps: 1\n"
        "max_completion_length: 8\nverbalizer_cache_dir: null\nuse_cpu: true\n"
    )
    return path


@pytest.mark.parametrize("teacher", ["same", "other"])
def test_the_command(
    recipe: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "page.html"
    words = ["--config", str(recipe), "--rows", "1", "--page", str(page), "--tokens=3"]
    words += ["--teacher_model_name_or_path", str(tmp_path / teacher), "--on_policy_divergence=jsd"]
    assert cli.main(["verbalize", *words]) == 0
    shown = capsys.readouterr().out
    for code in ("th", "km", "my"):
        assert f"{code} · row" in shown and f"<h2>{code} · row" in page.read_text("utf-8")
    assert "tokens more" in shown and "Page:" in shown
    assert ("Verbalizer(" in page.read_text("utf-8")) == (teacher == "other")
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "rows must be at least 1, got 0"),
        (["--top", "many"], "top must be int, got 'many'"),
        (["--page", "."], "page must be a file, got the folder '.'"),
        (["--row", "1"], "unknown config key 'row'; did you mean 'rows'?"),
        (
            ["--ce_weight", "1", "--off_policy_weight=0", "--on_policy_weight=0"],
            "there must be a teacher to look at",
        ),
        (["--dataset_name", "no.jsonl"], "'no.jsonl' does not exist"),
        (["--teacher_cache", "cache"], "teacher_cache must be left out: a live teacher"),
        (["--teacher_url", "http://localhost:1"], "teacher_url must be left out: a live teacher"),
    ],
)
def test_bad_arguments_are_told_in_a_line(
    recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verbalize", "--config", str(recipe), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
