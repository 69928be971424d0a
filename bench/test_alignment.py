"""Which share of a student's rows pairs with those of a teacher that has another tokenizer, by
language: the embedded strings as responses, eos included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.report import Results
from bench.vocabularies import TEXT_LANGUAGES, qwen, qwen3_6, smollm2, tekken, texts
from dudi.demo_data import data_path
from dudi_kernels import Aligner, Tokens


def _demo() -> Any:
    return AutoTokenizer.from_pretrained(data_path("tokenizer"))


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "demo": _demo,
    "SmolLM2": smollm2,
    "Qwen2.5": qwen,
    "Qwen3.6": qwen3_6,
    "tekken": tekken,
}
PAIRS = (
    ("demo", "Qwen2.5"),
    ("demo", "Qwen3.6"),
    ("demo", "tekken"),
    ("SmolLM2", "Qwen2.5"),
    ("SmolLM2", "tekken"),
    ("tekken", "Qwen2.5"),
    ("tekken", "Qwen3.6"),
    ("Qwen2.5", "Qwen3.6"),
)


@lru_cache(maxsize=len(TOKENIZERS))
def _known(name: str) -> tuple[Any, Tokens]:
    tokenizer = TOKENIZERS[name]()
    return tokenizer, Tokens.of(tokenizer)


def _ids(name: str, texts: list[str]) -> list[list[int]]:
    tokenizer, tokens = _known(name)
    eos = min(tokens.eos)
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], eos] for text in texts]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_alignment(pair: tuple[str, str], results: Results) -> None:
    try:
        aligner = Aligner(*(_known(name)[1] for name in pair))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    line: dict[str, Any] = {"student / teacher": " / ".join(pair)}
    for language in TEXT_LANGUAGES:
        student, teacher = (_ids(name, texts(language)) for name in pair)
        found = aligner(student, teacher)
        paired = sum(len(rows) for rows in found.student_rows)
        line[language] = f"{paired / sum(map(len, student)):.0%}"
    results.tables["rows that pair"].append(line)
