"""Run folders and checkpoints: which may be written, which a run can go on from.

A checkpoint counts as whole if a run can go on from it exactly: its files are those of its manifest
(saving.py), optimizer, schedule and random state among them.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from dudi.config import resume_mismatches
from dudi.saving import STAGING, flaw

CONFIG_FILE = "dudi_config.json"
STATE_FILE = "trainer_state.json"
WINDOW_FILE = "log_window.json"
NEEDED = ("optimizer*", "scheduler.pt", "rng_state*.pth", STATE_FILE, WINDOW_FILE)


def why_not_whole(folder: Path) -> str | None:
    """What keeps a run from going on from a checkpoint; None: nothing."""
    found = flaw(folder)
    if found is not None:
        return found
    missing = [name for name in NEEDED if not any(folder.glob(name))]
    return f"it has no {missing[0]}" if missing else None


def last_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest whole `checkpoint-N` of a run, or None; newer ones are named in a warning."""
    found = [c for c in Path(run_dir).glob("checkpoint-*") if CHECKPOINT.fullmatch(c.name)]
    for folder in sorted(found, key=lambda c: int(c.name.removeprefix("checkpoint-")))[::-1]:
        why = why_not_whole(folder)
        if why is None:
            return folder
        warnings.warn(f"{folder} is not whole and is passed over: {why}", stacklevel=2)
    return None


# ---- does it belong to this run ------------------------------------------------------------------

# What loading, saving or the Trainer may change in a model's configuration.
PASSING = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def model_mismatches(model_config: Any, checkpoint: Path) -> list[str]:
    """Settings of the architecture in which a checkpoint differs from the model to be resumed."""
    _check_readable(checkpoint)
    if not (checkpoint / "config.json").exists():  # an adapter's checkpoint
        return []
    saved, own = (
        json.loads(json.dumps(config.to_dict(), default=str))
        for config in (AutoConfig.from_pretrained(checkpoint), model_config)
    )
    names = (n for n in own if not n.startswith("_") and not n.endswith("_token_id"))
    return [
        f"{name}: checkpoint {saved.get(name)}, model {own[name]}"
        for name in names
        if name not in PASSING and saved.get(name) != own[name]
    ]


def _check_readable(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error


def run_mismatches(current: dict[str, Any], checkpoint: Path) -> list[str]:
    """In what recipe, adapter or data a checkpoint differs from the run that would go on."""
    path = checkpoint / CONFIG_FILE
    if not path.exists():
        return [f"it was not written by DuDiTrainer, there is no {CONFIG_FILE}"]
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return [
            *resume_mismatches(saved["config"], current["config"]),
            *_adapter_mismatches(saved["adapter"], current["adapter"]),
            *_teacher_mismatches(saved["teacher"], current["teacher"]),
            *_data_mismatches(saved["data"], current["data"]),
            *_map_mismatches(saved["map"], current["map"]),
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what DuDiTrainer writes: {error!r}") from error


def _adapter_mismatches(saved: dict[str, Any] | None, current: dict[str, Any] | None) -> list[str]:
    if saved is None or current is None:
        told = [("no adapter" if s is None else f"a {s['peft_type']}") for s in (saved, current)]
        return [] if saved == current else [f"it has {told[0]}, this run {told[1]}"]
    return [
        f"adapter {name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]


def _teacher_mismatches(saved: str | None, current: str | None) -> list[str]:
    if saved == current:
        return []
    return [f"the teacher was {saved or 'none'}, is {current or 'none'}"]


def _data_mismatches(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    if saved == current:
        return []
    if saved["rows"] != current["rows"]:
        return [f"the training data had {saved['rows']} rows, has {current['rows']}"]
    return [f"the {saved['rows']} rows of training data have other content or another order"]


def _map_mismatches(saved: str | None, current: str | None) -> list[str]:
    if saved == current:
        return []
    return ["the map between the vocabularies is another: a tokenizer, a head or the lexicon is"]


# ---- run folders ---------------------------------------------------------------------------------

# All that a run writes, and so all that overwriting it removes.
MAP_FILE = "verbalizer.safetensors"
BAD_ROWS_FILE = "bad_rows.jsonl"
FILES = (
    "run.json", "metrics.jsonl", "evaluation.json", "summary.json", "report.html", MAP_FILE,
    BAD_ROWS_FILE,
)  # fmt: skip
FOLDERS = ("model", "runs", STAGING)  # the final model, TensorBoard's events
CHECKPOINT = re.compile(r"checkpoint-\d+")


def holds_run(folder: Path) -> bool:
    """Whether a run or a demo of ours is in a folder: run.json tells."""
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and {"config", "environment"} <= info.keys()


def _written(folder: Path, more: tuple[str, ...] = ()) -> list[Path]:
    names = (*FILES, *(f"{file}.tmp" for file in FILES), *FOLDERS, *more)
    checkpoints = [c for c in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(c.name)]
    return [folder / name for name in names if (folder / name).exists()] + checkpoints


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
        if not holds_run(folder):
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


def check_inputs_stay(path: str | Path, inputs: dict[str, str | None]) -> None:
    """Raise if overwriting the run in `path` would remove one of the files it is made from."""
    removed = [child.resolve() for child in _written(Path(path))]
    for name, value in inputs.items():
        place = Path(value).expanduser().resolve() if value else None
        if place is None or not place.exists():
            continue
        if any(r == place or r in place.parents or place in r.parents for r in removed):
            raise ValueError(
                f"{name} {value!r} and output_dir {path} share files that --overwrite would remove"
            )


def clear_run(path: str | Path, *more: str) -> None:
    """Remove what an earlier run wrote to `path`, and `more` of that name; all else stays."""
    for child in _written(Path(path), more):
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
