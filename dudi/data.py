"""From rows of text to token ids: loading, preparing and collating.

`load_data` reads a file, a saved dataset or a Hub id. `prepare_dataset` checks every row, makes the
ids of prompt and completion (and of the verbalized prompt that the teacher sees), enforces the
length limits and counts what they cost. `DuDiCollator` pads a batch. Everything that can be wrong
with the data is found here, before training, with the row that is wrong.
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import jinja2
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from dudi.models import looks_like_a_path
from dudi.verbalize import CONTEXT_FIELDS, ContextVerbalizer

READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COLUMNS = Features(
    {
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "teacher_prompt_ids": List(Value("int32")),
        "language": Value("string"),
        "prompt_text": Value("string"),
        "completion_text": Value("string"),
        "row": Value("int64"),
    }
)
FLAGS = ("truncated_prompts", "truncated_completions", "long_teacher_prompts")

# ---- loading -----------------------------------------------------------------------------------


def load_data(
    name_or_path: str | Path, *, name: str | None = None, split: str = "train"
) -> Dataset:
    """A dataset from a JSONL, JSON, CSV, TSV or Parquet file, a `save_to_disk` folder or a Hub id.

    name: a Hub dataset's configuration. split: as `datasets.load_dataset` takes it ("train[:100]");
    a single file is all "train". In CSV and TSV files every value is text: 007 and NA stay so.
    Raises FileNotFoundError for a missing file and ValueError, which names the file (and line),
    for anything that is not a dataset.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return _load_file(path, split)
    if path.is_dir():
        return _load_folder(path, name, split)
    if looks_like_a_path(str(name_or_path)) or _suffix(path) in READERS:
        raise FileNotFoundError(f"dataset file or folder {str(name_or_path)!r} does not exist")
    return _load_hub(str(name_or_path), name, split)


def holds_one_split(name_or_path: str | Path) -> bool:
    """Whether this is one file or one saved dataset, which is all "train" to `load_data`."""
    path = Path(name_or_path).expanduser()
    return path.is_file() or (path / "state.json").is_file()


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _load_file(path: Path, split: str) -> Dataset:
    suffix = _suffix(path)
    if suffix not in READERS:
        raise ValueError(
            f"dataset file must end in one of {', '.join(READERS)} (or .gz of a text format), "
            f"got {str(path)!r}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"dataset file {str(path)!r} is empty")
    options: dict[str, Any] = {}
    try:
        if READERS[suffix] == "csv":
            options = _csv_options(path, suffix)
        elif READERS[suffix] == "json":
            _check_utf8(path)
        return load_dataset(READERS[suffix], data_files=str(path), split=split, **options)
    except Exception as error:
        if READERS[suffix] == "json" and not isinstance(error, (OSError, EOFError)):
            _raise_json_fault(path)
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise ValueError(
            f"dataset file {str(path)!r} can't be read (split {split!r}): {reason or error}"
        ) from error


def _csv_options(path: Path, suffix: str) -> dict[str, Any]:
    import pandas as pd

    separator = "\t" if suffix == ".tsv" else ","
    header = pd.read_csv(path, sep=separator, nrows=0).columns
    text = Features({column: Value("string") for column in header})
    return {"features": text, "keep_default_na": False, "sep": separator}


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _check_utf8(path: Path) -> None:
    """Arrow accepts bytes that are not UTF-8, and fails on them much later."""
    with _open_bytes(path) as file:
        for line in file:
            line.decode()


def _raise_json_fault(path: Path) -> None:
    """Raise ValueError for the first line that is not UTF-8 or not a JSON object, if any."""
    with _open_bytes(path) as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            file.seek(0)
            _parse_json(path, file.read(), 1)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            value = _parse_json(path, line, number) if line.strip() else {}
            if not isinstance(value, dict):
                raise ValueError(
                    f"{path}, line {number}: must be a JSON object, got {type(value).__name__}"
                )


def _parse_json(path: Path, text: bytes, first_line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: must be UTF-8, got {error.reason}") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}, line {line}, column {error.colno}: malformed JSON: {error.msg}"
        ) from None


def _load_folder(path: Path, name: str | None, split: str) -> Dataset:
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(str(path))
        if split not in splits:
            raise ValueError(f"split must be one of {', '.join(splits)} in {path}, got {split!r}")
        return splits[split]
    if (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        if split not in ("train", str(saved.split)):
            raise ValueError(
                f"split must be 'train' for {path}, which holds a single dataset, got {split!r}"
            )
        return saved
    try:
        return load_dataset(str(path), name, split=split)
    except Exception as error:
        raise ValueError(
            f"folder {str(path)!r} is not a dataset: it was not written by save_to_disk and holds "
            f"no data files that can be read as split {split!r}: {error}"
        ) from error


def _load_hub(hub_id: str, name: str | None, split: str) -> Dataset:
    try:
        return load_dataset(hub_id, name, split=split)
    except Exception as error:
        raise ValueError(
            f"dataset {hub_id!r} is neither a file or folder here nor a Hub dataset that could be "
            f"loaded (configuration {name!r}, split {split!r}): {type(error).__name__}: {error}"
        ) from error


# ---- rows --------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A row, checked: its texts, and its messages where it is a conversation."""

    prompt: str  # of a conversation: the last user turn
    completion: str
    prompt_messages: list[dict[str, Any]] | None
    completion_message: dict[str, Any] | None


def _describe(value: Any) -> str:
    return "nothing (null)" if value is None else type(value).__name__


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    """Messages without the nulls that Arrow adds to keys only other messages have."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{field} must be a list of messages, got {_describe(value)}")
    cleaned = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"{field} must be a list of messages with a role and content, "
                f"got one that is {message!r}"
            )
        if not isinstance(message.get("content"), str):
            raise TypeError(
                f"the content of each message in {field} must be text, "
                f"got {_describe(message.get('content'))}"
            )
        cleaned.append({key: item for key, item in message.items() if item is not None})
    if not cleaned:
        raise ValueError(f"{field} must hold at least one message, got none")
    return cleaned


def _example(row: Mapping[str, Any]) -> Example:
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            if not isinstance(completion, str):
                raise TypeError(f"completion must be text like prompt, got {_describe(completion)}")
            return _checked(Example(prompt, completion, None, None))
        if not isinstance(prompt, Sequence):
            raise TypeError(f"prompt must be text or a list of messages, got {_describe(prompt)}")
        before, answers = _messages(prompt, "prompt"), _messages(completion, "completion")
        if len(answers) != 1:
            raise ValueError(
                f"completion must hold one message, got {len(answers)}; earlier turns belong to "
                "prompt"
            )
    else:
        turns = _messages(row["messages"], "messages")
        before, answers = turns[:-1], turns[-1:]
        if not before:
            raise ValueError("messages must hold a prompt before the last turn, got one message")
    if answers[0]["role"] != "assistant":
        raise ValueError(
            f"the last turn must have the role 'assistant', got {answers[0]['role']!r}"
        )
    if before[-1]["role"] == "assistant":
        raise ValueError("the turn before the completion must not have the role 'assistant'")
    user = [message["content"] for message in before if message["role"] == "user"]
    text = user[-1] if user else before[-1]["content"]
    return _checked(Example(text, answers[0]["content"], before, answers[0]))


def _checked(example: Example) -> Example:
    if not example.completion.strip():
        raise ValueError(f"completion must not be empty, got {example.completion!r}")
    return example


def _context_text(row: Mapping[str, Any], field: str) -> str | None:
    """A verbalizer's field as text; of messages the last one's."""
    value = row.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return _messages(value, field)[-1]["content"]
    raise TypeError(f"{field} must be text or a list of messages, got {_describe(value)}")


def _verbalized_messages(example: Example, text: str) -> list[dict[str, Any]]:
    """The conversation with its last user turn replaced by `text`."""
    if example.prompt_messages is None:
        return [{"role": "user", "content": text}]
    messages = list(example.prompt_messages)
    for i in reversed(range(len(messages))):
        if messages[i]["role"] == "user":
            messages[i] = {**messages[i], "content": text}
            return messages
    raise ValueError("prompt must hold a user turn for the verbalizer to replace, got none")


# ---- token ids ---------------------------------------------------------------------------------


def _chat_text(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"the tokenizer's chat template refuses the row: {error}") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _plain_prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """With the tokenizer's BOS, and without the EOS that some add to every text."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id] and ids[-1:] != _ids(tokenizer, text)[-1:]:
        ids.pop()
    return ids


def _conversation_ids(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    assert example.prompt_messages is not None and example.completion_message is not None
    before = _chat_text(tokenizer, example.prompt_messages, True)
    whole = _chat_text(tokenizer, [*example.prompt_messages, example.completion_message], False)
    prompt, everything = _ids(tokenizer, before), _ids(tokenizer, whole)
    if everything[: len(prompt)] == prompt:
        return prompt, everything[len(prompt) :]
    if whole.startswith(before):  # one token spans the border: split it, as generation does
        rest = _ids(tokenizer, whole[len(before) :])
        if tokenizer.decode([*prompt, *rest]) == tokenizer.decode(everything):
            return prompt, rest
    pairs = enumerate(zip(before, whole, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(whole)))
    raise ValueError(
        "the tokenizer's chat template must render a prompt as the start of prompt and completion; "
        f"here the prompt goes on with {before[same:][:40]!r} where the whole has "
        f"{whole[same:][:40]!r}. Set a chat template without this difference, or give prompt and "
        "completion as plain text"
    )


def _ends_once(tokenizer: Any, ids: list[int]) -> list[int]:
    """The completion with EOS once, last: what a template puts after it (a newline) goes."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return [*ids, eos]
    end = ids.index(eos) + 1
    after = tokenizer.decode(ids[end:], skip_special_tokens=True)
    if after.strip():
        raise ValueError(
            f"completion must not hold the end-of-sequence token {tokenizer.eos_token!r} before "
            f"its end: {after[:40]!r} after it would never be generated"
        )
    return ids[:end]


def _teacher_ids(tokenizer: Any, example: Example, text: str) -> list[int]:
    messages = _verbalized_messages(example, text)
    if getattr(tokenizer, "chat_template", None):
        return _ids(tokenizer, _chat_text(tokenizer, messages, True))
    return _plain_prompt_ids(tokenizer, "\n\n".join(message["content"] for message in messages))


@dataclass
class _Preparer:
    """Turns a batch of rows into ids; one object, so that `map` can send it to other processes."""

    tokenizer: Any
    teacher_tokenizer: Any
    verbalizer: ContextVerbalizer | None
    max_prompt_length: int | None
    max_completion_length: int | None
    drop: bool
    split_name: str

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *FLAGS)}
        for i, row in enumerate(rows):
            try:
                made = self._row({name: values[i] for name, values in batch.items()})
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"row {row} of the {self.split_name} dataset: {error}") from error
            if not (self.drop and (made[FLAGS[0]] or made[FLAGS[1]])):
                made["row"] = row
                for name, values in out.items():
                    values.append(made[name])
        return out

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        example = _example(row)
        language = row.get("language")
        if language is not None and not isinstance(language, str):
            raise TypeError(f"language must be text, got {_describe(language)}")
        prompt, completion = self._student_ids(example)
        kept = prompt[-self.max_prompt_length :] if self.max_prompt_length else prompt
        answer = completion[: self.max_completion_length]
        seen = self._verbalized(row, example, language) if self.verbalizer else kept
        return {
            "prompt_ids": kept,
            "completion_ids": answer,
            "teacher_prompt_ids": seen,
            "language": language or "",
            "prompt_text": example.prompt,
            "completion_text": example.completion,
            "truncated_prompts": len(kept) < len(prompt),
            "truncated_completions": len(answer) < len(completion),
            "long_teacher_prompts": len(seen) > (self.max_prompt_length or len(seen)),
        }

    def _student_ids(self, example: Example) -> tuple[list[int], list[int]]:
        if example.prompt_messages is not None:
            if not getattr(self.tokenizer, "chat_template", None):
                raise ValueError(
                    "the tokenizer must have a chat template for conversational rows, got none; "
                    "set tokenizer.chat_template or give prompt and completion as plain text"
                )
            prompt, completion = _conversation_ids(self.tokenizer, example)
        else:
            prompt = _plain_prompt_ids(self.tokenizer, example.prompt)
            completion = _ids(self.tokenizer, example.completion)
        if not prompt:
            raise ValueError(
                "prompt must give at least one token, got an empty prompt and a tokenizer without "
                "a beginning-of-sequence token"
            )
        return prompt, _ends_once(self.tokenizer, completion)

    def _verbalized(self, row: Mapping[str, Any], example: Example, language: Any) -> list[int]:
        assert self.verbalizer is not None
        context = {field: _context_text(row, field) for field in CONTEXT_FIELDS}
        fields = {**row, **context, "prompt": example.prompt, "completion": example.completion}
        text = self.verbalizer.render(fields, language)
        ids = _teacher_ids(self.teacher_tokenizer, example, text)
        if not ids:
            raise ValueError(f"the verbalizer's prompt must give at least one token, got {text!r}")
        return ids


# ---- datasets ----------------------------------------------------------------------------------


def prepare_dataset(
    dataset: Dataset,
    tokenizer: Any,
    *,
    teacher_tokenizer: Any = None,  # default: the student's
    verbalizer: ContextVerbalizer | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    overlong: str = "truncate",
    split_name: str = "train",
    num_proc: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Token ids for every row, and counts of what the length limits did. Replaces, for each row,

        whole = tokenizer.apply_chat_template(prompt + completion)
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        completion_ids = whole[len(prompt_ids):]

    Rows hold `prompt` and `completion`, as text or as messages, or `messages` whose last turn is
    the completion. Text is tokenized as it is, the prompt with the tokenizer's BOS. A completion
    ends with EOS exactly once, unless it was truncated.

    Columns of the result: prompt_ids, completion_ids, teacher_prompt_ids (the verbalized prompt, or
    prompt_ids without a verbalizer), language ("" without), prompt_text, completion_text, row (the
    index in `dataset`).

    Limits are in tokens. overlong="truncate" keeps the end of a prompt and the start of a
    completion; "drop" leaves the row out. A verbalized prompt is never cut, since either end
    matters (the item comes first, the instruction last); those above max_prompt_length are counted.

    Counts: rows (of the result), truncated_prompts, truncated_completions, dropped,
    long_teacher_prompts.
    Raises ValueError or TypeError naming the row and what is wrong with it.
    """
    _check_arguments(dataset, tokenizer, max_prompt_length, max_completion_length, overlong)
    _check_columns(dataset, verbalizer, split_name)
    preparer = _Preparer(
        tokenizer,
        tokenizer if teacher_tokenizer is None else teacher_tokenizer,
        verbalizer,
        max_prompt_length,
        max_completion_length,
        overlong == "drop",
        split_name,
    )
    name = uuid.uuid4().hex  # the result is never reused: no hash of a tokenizer is trustworthy
    prepared = dataset.map(
        preparer,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({**COLUMNS, **{flag: Value("bool") for flag in FLAGS}}),
        num_proc=num_proc,
        load_from_cache_file=False,
        cache_file_name=str(_scratch() / f"{name}.arrow"),
        new_fingerprint=name,
        desc=f"Tokenizing {split_name} dataset",
    )
    counts = {flag: sum(prepared.with_format(None)[flag][:]) for flag in FLAGS}
    counts.update(rows=len(prepared), dropped=len(dataset) - len(prepared))
    if not len(prepared):
        raise ValueError(
            f"no row of the {split_name} dataset is left: all {len(dataset)} exceed "
            f"max_prompt_length={max_prompt_length} or "
            f"max_completion_length={max_completion_length} and overlong='drop'"
        )
    return prepared.remove_columns(list(FLAGS)), counts


def content_hash(dataset: Dataset) -> str:
    """A hash of a prepared dataset's ids: the same for the same rows in the same order."""
    digest = hashlib.blake2b(digest_size=16)
    columns = [name for name, feature in COLUMNS.items() if isinstance(feature, List)]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            lists = table[name].combine_chunks()
            for array in (lists.value_lengths(), lists.flatten()):
                digest.update(array.to_numpy(zero_copy_only=False).astype("int32").tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _scratch() -> Path:
    """Prepared ids lie on disk, not in memory, and not beside the user's data; gone at exit."""
    folder = tempfile.mkdtemp(prefix="dudi-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _check_arguments(
    dataset: Any,
    tokenizer: Any,
    max_prompt_length: int | None,
    max_completion_length: int | None,
    overlong: str,
) -> None:
    if isinstance(dataset, DatasetDict):
        raise TypeError(
            "dataset must be one split, got a DatasetDict: pass one of "
            f"{', '.join(map(str, dataset))}"
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, got {type(dataset).__name__}; "
            "Dataset.from_list makes one of a list of dicts"
        )
    for name, limit in (
        ("max_prompt_length", max_prompt_length),
        ("max_completion_length", max_completion_length),
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {limit}")
    if overlong not in ("truncate", "drop"):
        raise ValueError(f"overlong must be 'truncate' or 'drop', got {overlong!r}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer must have an end-of-sequence token, or completions never learn to end; "
            "set tokenizer.eos_token"
        )


def _check_columns(dataset: Dataset, verbalizer: ContextVerbalizer | None, split_name: str) -> None:
    columns = set(dataset.column_names)
    if not len(dataset):
        raise ValueError(f"the {split_name} dataset must have rows, got an empty dataset")
    conversations = "messages" in columns and "completion" not in columns
    needed = [] if conversations else ["prompt", "completion"]
    if verbalizer is not None:
        needed.append("language")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(
            f"the {split_name} dataset must have columns prompt and completion, or messages"
            f"{', and language for the context verbalizer' if verbalizer else ''}; "
            f"missing: {', '.join(missing)}; it has {', '.join(sorted(columns))}"
        )
    if verbalizer is not None:
        _check_languages(dataset, verbalizer, split_name)


def _check_languages(dataset: Dataset, verbalizer: ContextVerbalizer, split_name: str) -> None:
    """Every language has a template, found before the first row is rendered."""
    for language in dataset.unique("language"):
        if not isinstance(language, str) or not language:
            row = dataset.with_format(None)["language"][:].index(language)
            raise ValueError(
                f"row {row} of the {split_name} dataset: language must be a code such as 'th' for "
                f"the context verbalizer, got {language!r}"
            )
        try:
            verbalizer.resolve(language)
        except ValueError as error:
            raise ValueError(f"the {split_name} dataset: {error}") from None


# ---- batches -----------------------------------------------------------------------------------


class DuDiCollator:
    """Pads prepared rows into one batch: prompts on the left, completions on the right.

    Returns prompt_ids, prompt_mask, teacher_prompt_ids, teacher_prompt_mask, completion_ids,
    completion_mask (B, length) and row (B,), all int64. Masks come from lengths, never from
    comparing with the pad id, so a pad token that is also EOS costs no EOS.
    """

    def __init__(self, pad_token_id: int) -> None:
        if not isinstance(pad_token_id, int):
            raise TypeError(
                f"pad_token_id must be an int, got {pad_token_id!r}; "
                "a tokenizer without a pad token may use its eos_token_id"
            )
        self.pad_token_id = pad_token_id

    def __call__(self, features: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = list(features)
        batch: dict[str, Tensor] = {}
        for name, left in (("prompt", True), ("teacher_prompt", True), ("completion", False)):
            ids, mask = self._pad([row[f"{name}_ids"] for row in rows], left)
            batch[f"{name}_ids"], batch[f"{name}_mask"] = ids, mask
        batch["row"] = torch.tensor([int(row["row"]) for row in rows])
        return batch

    def _pad(self, sequences: list[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        width = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            length = len(sequence)
            span = slice(width - length, width) if left else slice(0, length)
            ids[i, span] = torch.as_tensor(sequence)
            mask[i, span] = 1
        return ids, mask
