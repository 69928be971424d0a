"""Lexicons: the file, the map that the loss reads, and how one is built from parallel rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console

from dudi.bridge import MapSettings, build_bridge
from dudi.cooccurrence import Limits, Splitter, log_likelihood_ratio, word_pairs
from dudi.demo_data import LANGUAGES, data_path, split_of, ui_strings
from dudi.lexicon import Entry, lexicon_verbalizer, read_lexicon, write_lexicon
from dudi.lexicon_build import (
    DEMO_LEXICON,
    Parallel,
    build_lexicon,
    demo_texts,
    parallel_texts,
    run_lexicon,
)
from dudi_kernels import LMHead, Verbalizer, linear_distill_loss

QUIET = Console(quiet=True)
WORDS = [("read", "membaca", "id"), ("read", "อ่าน", "th"), ("change", "mengubah", "id")]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "lexicon.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---- the file ------------------------------------------------------------------------------------


def test_comments_a_header_and_codes(tmp_path: Path) -> None:
    text = "\ufeff# by hand\nPivot\tTarget\tLanguage\n\nphone\ttelepono\ttl\r\n a b \t c\tzh_Hant\n"
    entries = [Entry("phone", "telepono", "fil"), Entry("a b", "c", "zh-hant")]
    path = written(tmp_path, text)
    assert read_lexicon(path) == entries
    assert read_lexicon(path, ["fil", "zh-Hant-TW"]) == entries
    write_lexicon(path, entries, "one\ntwo")
    assert path.read_text(encoding="utf-8").startswith("# one\n# two\npivot\ttarget\tlanguage\n")
    assert read_lexicon(path) == entries
    assert [p.name for p in tmp_path.iterdir()] == ["lexicon.tsv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phone\ttelepon\n", r"lexicon\.tsv, line 1: must be a pivot word, .* got 'phone\\ttelep"),
        ("# x\na\tb\tid\na\tb\tid\td\n", r"lexicon\.tsv, line 3: must be a pivot word"),
        ("a\tb\tid\na\t \tid\n", r"lexicon\.tsv, line 2: must be a pivot word"),
        (b"a\tb\tid\na\t\xff\tid\n", r"lexicon\.tsv, line 2: must be UTF-8"),
        ("# nothing\n", r"lexicon\.tsv' must have an entry, got none"),
        ("a\tb\tid\na\tb\txx\na\tb\tsw\n", r"languages of the data, got sw, xx; .* has id, th$"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lexicon(written(tmp_path, text), ["th", "id"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lexicon .*none\.tsv' does not exist"):
        read_lexicon(tmp_path / "none.tsv")


# ---- the map -------------------------------------------------------------------------------------


def first(text: str) -> int:
    return tiny.tokenizer().encode(text)[0]


def moved(p: torch.Tensor, share: float) -> torch.Tensor:
    """What from_lexicon's docstring says of WORDS, written out."""
    found = p.clone()
    for before in ("", " "):
        takers = {"read": [before + "membaca", "อ่าน"], "change": [before + "mengubah"]}
        for pivot, targets in takers.items():
            assert len(tiny.tokenizer().encode(before + pivot)) == 1
            giver = first(before + pivot)
            found[:, giver] -= share * p[:, giver]
            for target in targets:
                found[:, first(target)] += share * p[:, giver] / len(targets)
    return found


def classes(p: torch.Tensor) -> torch.Tensor:
    """Probabilities of both concepts and of all other tokens."""
    concepts = [
        {first(b + w) for b in ("", " ") for w in ("read", "membaca")} | {first("อ่าน")},
        {first(b + w) for b in ("", " ") for w in ("change", "mengubah")},
    ]
    assert not concepts[0] & concepts[1]
    together = [p[:, sorted(concept)].sum(1, keepdim=True) for concept in concepts]
    others = [i for i in range(p.shape[1]) if i not in concepts[0] | concepts[1]]
    return torch.cat([*together, p[:, others]], 1)


@pytest.mark.parametrize("kind", ["lexicon", "concepts"])
def test_both_kinds_reach_the_loss(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, "".join("\t".join(line) + "\n" for line in WORDS))
    teacher, student = tiny.model(1), tiny.model(0)
    settings = MapSettings(lexicon=str(path), lexicon_kind=kind, lexicon_share=0.3)
    bridge = build_bridge(student, teacher, tiny.tokenizer(), None, settings, ["id", "th", "en"])
    assert bridge.maps_tokens and bridge.pairing is None
    torch.manual_seed(0)
    hidden = [(4 * torch.randn(5, 32)).requires_grad_() for _ in range(2)]
    heads = [LMHead.from_model(model) for model in (student, teacher)]
    loss = linear_distill_loss(
        hidden[0], heads[0], hidden[1].detach(), heads[1], verbalizer=bridge.verbalizer
    ).loss
    loss.backward()
    states = [h.detach().double().requires_grad_() for h in hidden]
    q, p = (
        (h @ model.lm_head.weight.detach().double().T).softmax(-1)
        for h, model in zip(states, (student, teacher), strict=True)
    )
    p, q = (moved(p, 0.3), q) if kind == "lexicon" else (classes(p), classes(q))
    want = (p * (p.log() - q.log())).sum(1).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    difference = hidden[0].grad.double() - states[0].grad  # type: ignore[union-attr,operator]
    assert difference.norm() < 1e-5 * states[0].grad.norm()  # type: ignore[union-attr]


def test_a_lexicon_that_says_nothing_is_refused(tmp_path: Path) -> None:
    tokenizer, base = tiny.tokenizer(), Verbalizer.identity(tiny.VOCAB)
    entries = [Entry("incomprehensibilities", "x", "id")]
    with pytest.raises(ValueError, match="lexicon: pairs must have pivot words that are one token"):
        lexicon_verbalizer(entries, tokenizer, tokenizer, base)
    with pytest.raises(ValueError, match="kind must be lexicon or concepts, got 'words'"):
        lexicon_verbalizer(entries, tokenizer, tokenizer, base, kind="words")
    settings = MapSettings(lexicon=str(written(tmp_path, "phone\tsimu\tsw\n")))
    with pytest.raises(ValueError, match="must have languages of the data, got sw"):
        build_bridge(tiny.model(0), tiny.model(1), tokenizer, None, settings, LANGUAGES)


# ---- what belongs together -----------------------------------------------------------------------


def test_log_likelihood_ratio_is_mutual_information() -> None:
    """2 N times the mutual information of the table, in nats."""
    for both, a, b, n in [(30, 40, 35, 200), (5, 5, 5, 50), (0, 10, 20, 90), (8, 8, 40, 40)]:
        table = np.array([[both, a - both], [b - both, n - a - b + both]]) / n
        expected = np.outer(table.sum(1), table.sum(0))
        known = table > 0
        want = 2 * n * (table[known] * np.log(table[known] / expected[known])).sum()
        assert log_likelihood_ratio(both, a, b, n) == pytest.approx(want, rel=1e-9, abs=1e-9)


def sentences(count: int = 200) -> list[tuple[str, str]]:
    """Six words of twenty a row, translated word by word and shuffled; one more is in every row."""
    draw, rows = random.Random(0), []
    letters = "abcdefghijklmnopqrst"
    for _ in range(count):
        words = draw.sample(letters, 6)
        targets = [f"z{word}" for word in draw.sample(words, 6)]
        rows.append((" ".join(["The", *(w * 2 for w in words)]), " ".join([*targets, "der"])))
    return rows


def test_a_word_for_word_code_is_found_whatever_the_order_of_rows() -> None:
    rows = sentences()
    found = word_pairs(rows, Splitter())
    assert {(a, b) for a, b, _ in found} == {(c * 2, f"z{c}") for c in "abcdefghijklmnopqrst"}
    assert [pair.score for pair in found] == sorted((p.score for p in found), reverse=True)
    assert word_pairs(rows[::-1], Splitter()) == found
    assert word_pairs(rows, Splitter(), Limits(min_count=201)) == []
    assert word_pairs([], Splitter()) == []


def test_words_are_counted_without_case_and_written_as_they_mostly_are() -> None:
    rows = [("Wi-Fi network", "Jaringan Wi-Fi")] * 2 + [("Networks off", "mati")] * 5
    rows += [("network on", "jaringan")] * 3
    found = {(a, b) for a, b, _ in word_pairs(rows, Splitter(), Limits(min_score=0))}
    assert ("network", "jaringan") in found
    assert not any(a.casefold() == b.casefold() for a, b in found)  # Wi, Fi


def test_words_of_scripts_without_spaces_are_tokens() -> None:
    split = Splitter(tiny.tokenizer())
    text = "เปิด Wi-Fi และข้อความ"
    words = split(text)
    assert {"Wi", "Fi", "ข้อความ"} <= set(words) and all(word in text for word in words)
    assert split("நெட்வொர்க்கை") == ["நெட்வொர்க்கை"]  # Tamil has spaces, and marks within words
    assert split("𑄇鬱ก") == ["𑄇"]  # in the vocabulary as bytes alone
    with pytest.raises(ValueError, match=r"tokenizer must be given for scripts .*'เปิด'"):
        Splitter()(text)


# ---- building one --------------------------------------------------------------------------------


def test_rows_of_both_kinds() -> None:
    items: list[dict[str, Any]] = [
        {"en": "a", "id": "b", "th": None},
        {"en": "", "id": "c", "th": "d"},
    ]
    assert list(parallel_texts(items, "en", ["id", "th"])) == [Parallel("a", "b", "id")]
    rows: list[dict[str, Any]] = [
        {"completion": [{"role": "assistant", "content": "b"}], "pivot_completion": "a"}
        | {"language": "id"},
        {"completion": "b", "pivot_completion": None, "language": None},
    ]
    assert list(parallel_texts(rows, "en")) == [Parallel("a", "b", "id")]


@pytest.mark.parametrize(
    ("row", "languages", "message"),
    [
        ({"prompt": "a", "completion": "b"}, None, "row 0 must have completion, pivot_completion"),
        ({"fr": "a", "id": "b"}, ["id"], "a column 'en' and one for each of languages; it has fr"),
        ({"en": "a", "id": "b"}, None, "languages named; it has en, id"),
        ({"en": "a", "id": "b"}, ["th"], "row 0 must have a column 'th', it has en, id"),
        ({"completion": "b", "pivot_completion": "a"}, None, "row 0 must have a language, got No"),
    ],
)
def test_rows_that_are_not_parallel(row: Any, languages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(parallel_texts([row], "en", languages))


def test_the_command_writes_what_the_trainer_reads(tmp_path: Path) -> None:
    data, path = tmp_path / "rows.jsonl", tmp_path / "out" / "lexicon.tsv"
    rows = [{"en": pivot, "xx": target} for pivot, target in sentences()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options: dict[str, Any] = {"languages": ["xx"], "console": QUIET}
    run_lexicon(str(data), str(path), **options)
    entries = read_lexicon(path, ["xx"])
    assert len(entries) == 20 and Entry("aa", "za", "xx") in entries
    assert entries == build_lexicon((a, b, "xx") for a, b in sentences())
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        run_lexicon(str(data), str(path), **options)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"min_dice": 1.5}, r"min_dice must be in \[0, 1\], got 1.5"),
        ({"min_count": 500}, "texts must have words that recur together, got none in 200 rows"),
    ]
    for more, message in refused:
        with pytest.raises(ValueError, match=message):
            run_lexicon(str(data), str(path), overwrite=True, **options, **more)
    assert read_lexicon(path) == entries
    with pytest.raises(ValueError, match="texts must have rows in two languages, got none"):
        build_lexicon([("same", "same", "id")])


def test_the_demo_lexicon_is_made_again_from_the_train_split(tmp_path: Path) -> None:
    shipped = data_path(DEMO_LEXICON)
    again = run_lexicon("demo", str(tmp_path / "lexicon.tsv"), console=QUIET)
    assert again.read_bytes() == shipped.read_bytes()
    assert len(read_lexicon(shipped, LANGUAGES)) > 1000
    held_out = {item["en"] for item in ui_strings() if split_of(item["key"]) != "train"}
    assert held_out and not held_out & {text.pivot for text in demo_texts()}
    assert {text.language for text in demo_texts(["th", "lo"])} == {"th", "lo"}
    with pytest.raises(ValueError, match=r"languages must be of id, .*, ta, got jv"):
        run_lexicon("demo", str(tmp_path / "none.tsv"), languages=["th", "jv"], console=QUIET)
