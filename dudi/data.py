"""Datasets: loading, preparing and collating.

`load_data` reads a file, a saved dataset or a Hub id. `prepare_dataset` checks every row, makes the
ids of prompt and completion (and of what the teacher reads: rows.py), enforces the length limits
and counts what they cost. `DuDiCollator` pads a batch. Everything that can be wrong
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
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

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

from dudi.demo_data import DEMO, translation_rows
from dudi.models import looks_like_a_path
from dudi.pairing import Pairing
from dudi.rows import Example, Prompt, Reader, TeacherPrompts, language_of, student_ids
from dudi.verbalize import ContextVerbalizer

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
        "plain_prompt_ids": List(Value("int32")),
        "language": Value("string"),
        "prompt_text": Value("string"),
        "completion_text": Value("string"),
        "row": Value("int64"),
    }
)
OVERLONG = ("truncated_prompts", "truncated_completions", "truncated_teacher_prompts")
UNPAIRED = "unpaired_responses"
FLAGS = (*OVERLONG, UNPAIRED)
PROBLEM = "problem"  # why a row can't be used; "" where it can

# ---- loading -----------------------------------------------------------------------------------


def load_data(
    name_or_path: str | Path, *, name: str | None = None, split: str = "train"
) -> Dataset:
    """A dataset from a JSONL, JSON, CSV, TSV or Parquet file, a `save_to_disk` folder or a Hub id;
    "demo", where nothing here has that name: the embedded translations.

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
    if name_or_path == DEMO:
        return Dataset.from_list(translation_rows(split))
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


# ---- preparing ---------------------------------------------------------------------------------


@dataclass
class _Preparer:
    """Turns a batch of rows into ids; one object, so that `map` can send it to other processes."""

    reader: Reader
    teacher: TeacherPrompts
    pairing: Pairing | None  # where the teacher has another tokenizer
    max_completion_length: int | None
    drop: bool
    skip_bad: bool
    split_name: str

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *FLAGS, PROBLEM)}
        for i, row in enumerate(rows):
            try:
                made = self._row({name: values[i] for name, values in batch.items()})
            except (TypeError, ValueError) as error:
                if not self.skip_bad:
                    kind = TypeError if isinstance(error, TypeError) else ValueError
                    raise kind(f"row {row} of the {self.split_name} dataset: {error}") from error
                made = _empty_row(str(error))
            if not (self.drop and any(made[flag] for flag in OVERLONG)):
                made["row"] = row
                for name, values in out.items():
                    values.append(made[name])
        return out

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        example, language = Example.of(row), language_of(row)
        prompt, completion = student_ids(self.reader, example)
        answer = completion[: self.max_completion_length]
        plain = prompt if self.pairing is None else self.teacher.plain(row)
        seen = self._seen(row, example, plain)
        return {
            "prompt_ids": prompt.ids,
            "completion_ids": answer,
            "teacher_prompt_ids": seen.ids,
            "plain_prompt_ids": plain.ids,
            "language": language or "",
            "prompt_text": example.prompt,
            "completion_text": example.completion,
            "truncated_prompts": prompt.cut,
            "truncated_completions": len(answer) < len(completion),
            "truncated_teacher_prompts": seen.cut and seen is not prompt,
            UNPAIRED: self.pairing is not None and bool(self.pairing([answer]).differs),
            PROBLEM: "",
        }

    def _seen(self, row: Mapping[str, Any], example: Example, plain: Prompt) -> Prompt:
        """What the teacher reads; a template that shows a sample gets the reference here."""
        if self.teacher.verbalizer is None:
            return plain
        return self.teacher.verbalized(row, example.completion)


def _empty_row(problem: str) -> dict[str, Any]:
    """Holds the place of a bad row until it is set aside."""
    values = {name: [] if isinstance(kind, List) else "" for name, kind in COLUMNS.items()}
    return {**values, **dict.fromkeys(FLAGS, False), PROBLEM: problem}


# ---- datasets ----------------------------------------------------------------------------------


def prepare_dataset(
    dataset: Dataset,
    tokenizer: Any,
    *,
    teacher_tokenizer: Any = None,  # default: the student's
    verbalizer: ContextVerbalizer | None = None,
    pairing: Pairing | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_teacher_prompt_length: int | None = None,
    max_unpaired: float = 1.0,
    overlong: str = "truncate",
    quarantine: list[dict[str, Any]] | None = None,
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
    plain_prompt_ids without a verbalizer), plain_prompt_ids (the student's prompt in the teacher's
    tokens), language ("" without), prompt_text, completion_text, row (the index in `dataset`).

    teacher_tokenizer, pairing: of a teacher with a tokenizer of its own, which pairing has read
    already; responses are checked then. `max_unpaired` is the share of them whose bytes the
    teacher's tokenizer may change. chat_template_kwargs: switches of both chat templates, such as
    `{"enable_thinking": False}`.

    Limits are in tokens. overlong="truncate" takes the middle out of a prompt, so that what comes
    first, what is asked last and the start of the answer that a chat template writes stay, and
    keeps the start of a completion; "drop" leaves the row out.

    quarantine: where bad rows go, as {"split", "row", "reason"}, with a warning; without it they
    are errors.

    Counts: rows (of the result), truncated_prompts, truncated_completions,
    truncated_teacher_prompts, unpaired_responses, dropped, bad_rows.
    Raises ValueError or TypeError naming the row and what is wrong with it.
    """
    _check_arguments(
        dataset,
        tokenizer,
        overlong,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        max_teacher_prompt_length=max_teacher_prompt_length,
    )
    _check_columns(dataset, verbalizer, split_name, quarantine is not None)
    switches = dict(chat_template_kwargs or {})
    teacher_reader = Reader(
        tokenizer if teacher_tokenizer is None else teacher_tokenizer,
        switches,
        max_teacher_prompt_length,
    )
    preparer = _Preparer(
        Reader(tokenizer, switches, max_prompt_length),
        TeacherPrompts(teacher_reader, verbalizer),
        pairing,
        max_completion_length,
        overlong == "drop",
        quarantine is not None,
        split_name,
    )
    name = uuid.uuid4().hex  # the result is never reused: no hash of a tokenizer is trustworthy
    prepared = dataset.map(
        preparer,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(
            {**COLUMNS, **{flag: Value("bool") for flag in FLAGS}, PROBLEM: Value("string")}
        ),
        num_proc=num_proc,
        load_from_cache_file=False,
        cache_file_name=str(_scratch() / f"{name}.arrow"),
        new_fingerprint=name,
        desc=f"Tokenizing {split_name} dataset",
    )
    dropped = len(dataset) - len(prepared)
    prepared, bad = _set_aside(prepared, split_name)
    if quarantine is not None:
        quarantine += bad
    counts = {flag: sum(prepared.with_format(None)[flag][:]) for flag in FLAGS}
    counts.update(rows=len(prepared), dropped=dropped, bad_rows=len(bad))
    if not len(prepared):
        told = f"{len(bad)} are bad, {dropped}" if bad else f"all {len(dataset)}"
        raise ValueError(
            f"no row of the {split_name} dataset is left: {told} exceed "
            f"max_prompt_length={max_prompt_length}, "
            f"max_completion_length={max_completion_length} or "
            f"max_teacher_prompt_length={max_teacher_prompt_length} and overlong='drop'"
        )
    _check_unpaired(prepared, counts, max_unpaired, split_name)
    return prepared.remove_columns([*FLAGS, PROBLEM]), counts


def _set_aside(prepared: Dataset, split_name: str) -> tuple[Dataset, list[dict[str, Any]]]:
    """The rows that can be used, and what is wrong with the others."""
    problems, numbers = (prepared.with_format(None)[name][:] for name in (PROBLEM, "row"))
    bad = [
        {"split": split_name, "row": row, "reason": problem}
        for row, problem in zip(numbers, problems, strict=True)
        if problem
    ]
    if not bad:
        return prepared, bad
    warnings.warn(
        f"{len(bad)} of {len(problems)} rows of the {split_name} dataset are bad and left out; "
        f"row {bad[0]['row']} is the first: {bad[0]['reason']}",
        stacklevel=3,
    )
    return prepared.select([i for i, problem in enumerate(problems) if not problem]), bad


def _check_unpaired(
    prepared: Dataset, counts: Mapping[str, int], most: float, split_name: str
) -> None:
    """Responses that the teacher's tokenizer spells in other bytes."""
    if not counts[UNPAIRED]:
        return
    flags, numbers = (prepared.with_format(None)[name][:] for name in (UNPAIRED, "row"))
    rows = [number for number, flag in zip(numbers, flags, strict=True) if flag]
    told = (
        f"the teacher's tokenizer changes the bytes of {counts[UNPAIRED]} of {counts['rows']} "
        f"responses of the {split_name} dataset (it normalizes text; row {rows[0]} is the first)"
    )
    if counts[UNPAIRED] > most * counts["rows"]:
        raise ValueError(f"{told}: more than max_unpaired={most} allows")
    warnings.warn(f"{told}: the teacher says nothing about them", stacklevel=3)


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


def _check_arguments(dataset: Any, tokenizer: Any, overlong: str, **limits: int | None) -> None:
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
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {limit}")
    if overlong not in ("truncate", "drop"):
        raise ValueError(f"overlong must be 'truncate' or 'drop', got {overlong!r}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer must have an end-of-sequence token, or completions never learn to end; "
            "set tokenizer.eos_token"
        )


def _check_columns(
    dataset: Dataset, verbalizer: ContextVerbalizer | None, split_name: str, skip_bad: bool
) -> None:
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
        _check_languages(dataset, verbalizer, split_name, skip_bad)


def _check_languages(
    dataset: Dataset, verbalizer: ContextVerbalizer, split_name: str, skip_bad: bool
) -> None:
    """Every language has a template, found before the first row is rendered."""
    for language in dataset.unique("language"):
        if not isinstance(language, str) or not language:
            if skip_bad:
                continue  # bad rows, not a template that was forgotten
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

    Returns prompt_ids, prompt_mask, teacher_prompt_ids, teacher_prompt_mask, plain_prompt_ids,
    plain_prompt_mask, completion_ids, completion_mask (B, length) and row (B,), all int64. Masks
    come from lengths, never from comparing with the pad id, so a pad token that is also EOS costs
    no EOS.
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
        for name in ("prompt", "teacher_prompt", "plain_prompt", "completion"):
            ids, mask = self._pad([row[f"{name}_ids"] for row in rows], name != "completion")
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
