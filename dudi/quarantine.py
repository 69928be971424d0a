"""Rows that a run leaves out, in `bad_rows.jsonl`: of its data, or of the divergences of a step.

With `bad_rows: skip` that is a row that can't be read or tokenized, one whose teacher's answer was
in a damaged part of a cache (both told before the first step, for the whole run), and a response to
which a server gave no usable answer (in its step alone). A run that goes on drops what it is about
to redo.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dudi.callbacks import read_jsonl, write_text
from dudi.checkpoints import BAD_ROWS_FILE
from dudi.saving import disk_errors

Record = dict[str, Any]  # split, row, reason; of a step also step and response, given or sample


class Quarantine(TrainerCallback):
    def __init__(self) -> None:
        self.of_data: list[Record] = []
        self.of_steps: list[Record] = []

    def __len__(self) -> int:
        return len(self.of_data) + len(self.of_steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.of_steps = []
        if not state.is_world_process_zero:
            return
        path = _path(args)
        kept = (r for r in read_jsonl(path) if "step" in r)
        self.of_steps = [r for r in kept if r["step"] <= state.global_step]
        if len(self) or path.exists():
            with disk_errors(path):
                write_text(path, _lines([*self.of_data, *self.of_steps]))

    def check_ranks(self, rows: int) -> None:
        """Raise on every rank where one of them has left out other rows: a damaged disk of its own
        would have the others wait for it forever."""
        found = gather_object([(rows, _lines(self.of_data))])
        if any(one != found[0] for one in found):
            told = ", ".join(str(count) for count, _ in found)
            raise ValueError(
                f"all ranks must train on the same rows, they have {told}: a file or a cache is "
                "damaged on some machine"
            )

    def leave_out(self, found: list[Record]) -> None:
        """Rows of the data; those of a dataset that is evaluated again are known."""
        self.of_data += [record for record in found if record not in self.of_data]

    def add(self, found: list[Record], args: TrainingArguments) -> None:
        """Of this step, by any rank."""
        self.of_steps += found
        if not found or not args.should_save:
            return
        path = _path(args)
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(_lines(found))
            file.flush()
            os.fsync(file.fileno())


def _path(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / BAD_ROWS_FILE


def _lines(records: list[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
