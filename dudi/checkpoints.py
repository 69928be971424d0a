"""Run folders and checkpoints: which may be written, which a run can go on from.

A checkpoint counts as whole once `trainer_state.json` parses: the Trainer writes it last.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

CONFIG_FILE = "dudi_config.json"
STATE_FILE = "trainer_state.json"


def is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest whole `checkpoint-N` of a run, or None."""
    found = [
        (int(match[1]), folder)
        for folder in Path(run_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and is_whole(folder)
    ]
    return max(found)[1] if found else None


def shape_mismatches(model_config: Any, checkpoint: Path) -> list[str]:
    """Architecture fields in which a checkpoint's model differs from the model to be resumed."""
    path = checkpoint / "config.json"
    if not path.exists():  # an adapter's checkpoint has no model configuration
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    return [
        f"{name}: checkpoint {saved[name]}, model {getattr(model_config, name)}"
        for name in names
        if name in saved and saved[name] != getattr(model_config, name, saved[name])
    ]


# ---- run folders ---------------------------------------------------------------------------------

OUR_FILES = ("run.json", "metrics.jsonl", "checkpoint-*")  # what tells a run of ours


def check_output_dir(path: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Raise unless a run may write to `path`; leaves nothing behind.

    A folder with something in it needs `resume`, or `overwrite` where it holds a run of ours.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        if not overwrite:
            raise ValueError(
                f"output_dir {folder} is not empty: pass --resume to go on with the run in it or "
                "--overwrite to replace it"
            )
        if not any(True for pattern in OUR_FILES for _ in folder.glob(pattern)):
            raise ValueError(f"output_dir {folder} holds no run: not overwritten")
        here = Path.cwd()
        if (folder / ".git").exists() or folder.resolve() in (here, *here.parents):
            raise ValueError(f"output_dir {folder} holds more than a run: not overwritten")
    if resume and not folder.is_dir():
        raise ValueError(f"output_dir {folder} does not exist: there is nothing to resume")
    _check_writable(folder)


def _check_writable(folder: Path) -> None:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {folder} can't be written: {error}") from error


def clear_run(path: str | Path) -> None:
    """Remove what an earlier run left in `path`."""
    for child in Path(path).glob("*"):
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
