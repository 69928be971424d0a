"""The embedded demo data: user-interface strings in ten languages, as translation instructions.

951 keyed strings of the Android framework (see data/NOTICE) in English and nine languages. Keys are
split into train, validation and test by a hash; keys whose English texts are nearly the same always
share a split, so that the test split holds nothing that was trained on. Each key gives 18 rows:
English to and from each language. `train_tokenizer` makes the tokenizer in data/tokenizer again
from the train split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dudi.verbalize import DEFAULT_TEMPLATES, LANGUAGE_NAMES

DEMO = "demo"  # a dataset_name: the embedded translations
LANGUAGES = ("id", "ms", "vi", "th", "fil", "my", "km", "lo", "ta")
SPLITS = ("train", "validation", "test")
# A related language, or one written without spaces, that is neither source nor target.
PIVOTS = {
    "id": "ms",
    "ms": "id",
    "vi": "id",
    "th": "lo",
    "fil": "id",
    "my": "th",
    "km": "th",
    "lo": "th",
    "ta": "id",
}
SAME_TEXT = 0.8  # share of common words from which two English texts count as nearly the same

VOCAB_SIZE = 16_384
MAX_TOKEN_BYTES = 24  # eight Thai letters: no whole unspaced phrase becomes one token
TEMPLATE_COPIES = 20  # instructions are in every prompt: let them cost few tokens
PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
# Letters take their combining marks along, or Thai, Khmer, Lao, Burmese and Tamil words shatter.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def data_path(name: str) -> Path:
    """Path of an embedded file or folder: ui_strings.jsonl.gz, tokenizer, ..."""
    return Path(str(files("dudi") / "data" / name))


@lru_cache(maxsize=1)
def _strings() -> tuple[dict[str, str], ...]:
    with gzip.open(data_path("ui_strings.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return tuple(json.loads(line) for line in lines)


def ui_strings() -> list[dict[str, str]]:
    """One dict per key: `key`, `en` and the nine languages of `LANGUAGES`."""
    return [dict(item) for item in _strings()]


def similarity(first: frozenset[str], second: frozenset[str]) -> float:
    """Dice coefficient of two sets of words: 2 |A and B| / (|A| + |B|)."""
    return 2 * len(first & second) / max(len(first) + len(second), 1)


def words(text: str) -> frozenset[str]:
    """Words of a text without case and punctuation (Wi-Fi and WiFi are one word)."""
    return frozenset(re.sub(r"[^\w\s]", "", text.lower()).split())


@lru_cache(maxsize=1)
def _families() -> dict[str, str]:
    """key -> the first key of its family: keys joined by nearly the same English text."""
    family: dict[str, str] = {}
    seen: list[tuple[str, frozenset[str]]] = []
    for item in _strings():
        key, own = item["key"], words(item["en"])
        related = {family[other] for other, theirs in seen if similarity(own, theirs) >= SAME_TEXT}
        head = min(related | {key})
        family[key] = head
        if related - {head}:
            family = {k: head if f in related else f for k, f in family.items()}
        seen.append((key, own))
    return family


def split_of(key: str) -> str:
    """train, validation or test (about 80, 6 and 14 % of the keys).

    Raises KeyError for a key that is not in the data.
    """
    digest = hashlib.sha256(_families()[key].encode()).digest()
    share = int.from_bytes(digest[:4], "big") % 100
    if share < 79:
        return "train"
    return "validation" if share < 86 else "test"


def instruction(source: str, target: str) -> str:
    """The instruction before the text to translate."""
    return f"Translate from {LANGUAGE_NAMES[source]} to {LANGUAGE_NAMES[target]}: "


def directions() -> list[tuple[str, str, str]]:
    """(source, target, pivot) of the 18 directions; the pivot is neither source nor target."""
    outward = [("en", language, PIVOTS[language]) for language in LANGUAGES]
    inward = [(language, "en", "ms" if language == "id" else "id") for language in LANGUAGES]
    return outward + inward


def translation_rows(split: str) -> list[dict[str, Any]]:
    """Conversational rows of a split, key by key and direction by direction.

    Columns: prompt, completion (messages), language (the target's code), pivot_prompt (the text in
    a third language, for the teacher only), key, source. Untranslated texts are left out.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return [
        _row(item, source, target, pivot)
        for item in _strings()
        if split_of(item["key"]) == split
        for source, target, pivot in directions()
        if item[source] and item[target] and item[source] != item[target]
    ]


def _row(item: dict[str, str], source: str, target: str, pivot: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": instruction(source, target) + item[source]}],
        "completion": [{"role": "assistant", "content": item[target]}],
        "language": target,
        "pivot_prompt": item[pivot],
        "key": item["key"],
        "source": source,
    }


def tokenizer_texts() -> Iterator[str]:
    """What the tokenizer is trained on: the train split, instructions, verbalizer templates."""
    for item in _strings():
        if split_of(item["key"]) == "train":
            yield from (item[language] for language in ("en", *LANGUAGES))
    for _ in range(TEMPLATE_COPIES):
        for source, target, _pivot in directions():
            yield instruction(source, target)
        for template in DEFAULT_TEMPLATES.values():
            yield re.sub(r"{[{%].*?[%}]}", "", template)


def train_tokenizer(output_dir: str | Path) -> PreTrainedTokenizerFast:
    """Train the demo's byte-level BPE and save it: the same bytes each time."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        max_token_length=MAX_TOKEN_BYTES,
        special_tokens=[PAD, END, USER, ASSISTANT, SYSTEM],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(output_dir)
    return tokenizer
