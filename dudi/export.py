"""`dudi export`: a run, checkpoint or adapter as one folder that `from_pretrained` loads.

    adapters      merged into their base, in fp32, then in the base's type
    weights       safetensors, bit for bit as saved unless `dtype` asks for another type
    tokenizer     with its chat template
    generation_config.json   byte for byte; none where the model has none
    README.md     a filled model card (model_card.py)

Written beside its place and renamed: the folder is whole or not there, and manifest.json, which is
written last, has the size of each file.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig
from transformers.utils import cached_file

from dudi.checkpoints import CHECKPOINT, holds_run, last_checkpoint
from dudi.finite import weights_are_finite
from dudi.model_card import read_evaluations, write_card
from dudi.models import load_model, load_tokenizer, looks_like_a_path
from dudi.saving import MANIFEST_FILE, disk_errors, flaw, seal

GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where the parts of an exported model come from: folders, or Hub ids."""

    model: str  # whole weights; of an adapter, its base
    adapter: Path | None
    run: Path | None  # the folder with run.json

    @property
    def folder(self) -> str:
        """What the checkpoint itself is, as the caller named it."""
        return self.model if self.adapter is None else str(self.adapter)

    @property
    def name(self) -> str:
        """What to call the export: the run's name, or the model's."""
        return (self.run or Path(self.folder.rstrip("/"))).resolve().name


def find_source(model_name_or_path: str) -> Source:
    """What a run folder, a folder in it, a model's or adapter's folder, or a Hub id stands for.

    Of a run's folder it is the final model, else the newest whole checkpoint.
    """
    path = Path(model_name_or_path).expanduser()
    if not path.is_dir():
        if path.exists() or looks_like_a_path(model_name_or_path):
            told = "is a file" if path.exists() else "does not exist"
            raise ValueError(f"model_name_or_path {model_name_or_path!r} {told}")
        return Source(model_name_or_path, None, None)
    run = next((p for p in (path, path.absolute().parent) if holds_run(p)), None)
    if run == path:
        path = _model_of(run)
    if CHECKPOINT.fullmatch(path.name) and (found := flaw(path)) is not None:
        raise ValueError(f"model_name_or_path {path} is not whole: {found}")
    if (path / ADAPTER_FILE).exists():
        return Source(_base_of(path), path, run)
    return Source(str(path), None, run)


def _model_of(run: Path) -> Path:
    found = run / "model" if (run / "model").is_dir() else last_checkpoint(run)
    if found is None:
        raise ValueError(f"model_name_or_path {run} is a run without a model or whole checkpoint")
    return found


def _base_of(adapter: Path) -> str:
    path = adapter / ADAPTER_FILE
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} must name its base in base_model_name_or_path, got {base!r}")
    return base


# ---- parts ---------------------------------------------------------------------------------------


def load_merged(source: Source, dtype: str | None) -> Any:
    """The whole model, its adapter merged, its weights finite; in its own type or in `dtype`."""
    wanted = None if dtype is None else DTYPES[dtype]
    if source.adapter is None:
        model = load_model(source.model, {"dtype": wanted or "auto"}, "model_name_or_path")
    else:
        model = load_model(source.model, {"dtype": "auto"}, "the adapter's base")
        wanted = wanted or model.dtype
        model = _merge(model.float(), source.adapter).to(wanted)
    if not weights_are_finite(model):
        raise ValueError(f"the weights of {source.folder} are not finite: not exported")
    return model


def _merge(base: Any, adapter: Path) -> Any:
    """In fp32, as the adapter was trained: what it adds may lie below bf16's rounding."""
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"the adapter {adapter} does not fit its base: {error}") from error
    return merged.requires_grad_(True)  # weights_are_finite looks at what can be trained


def load_own_tokenizer(source: Source) -> Any:
    """The checkpoint's; of an adapter that has none, its base's."""
    own = source.adapter is not None and not (source.adapter / "tokenizer_config.json").exists()
    return load_tokenizer(source.model if own else source.folder, "model_name_or_path")


def generation_config_of(source: Source) -> Path | None:
    """The file to be kept as it is; None where the model has none."""
    for place in dict.fromkeys((source.folder, source.model)):
        if Path(place).expanduser().is_dir():
            path = Path(place).expanduser() / GENERATION_FILE
            found = path if path.is_file() else None
        else:
            file = cached_file(
                place,
                GENERATION_FILE,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            found = Path(file) if file else None
        if found is not None:
            return found
    return None


def _save_model(model: Any, source: Source, folder: Path) -> None:
    kept = generation_config_of(source)
    # save_pretrained would write its own version of the file, or refuse an odd one
    model.generation_config = GenerationConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(folder)
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    if kept is not None:
        shutil.copyfile(kept, folder / GENERATION_FILE)


# ---- the folder ----------------------------------------------------------------------------------


def check_target(path: Path, overwrite: bool, mark: str = MANIFEST_FILE) -> None:
    """Raise unless `path` may be written: it is new or empty, or to be replaced and ours."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"output_dir {path} is not empty: pass --overwrite to replace it")
    if not (path / mark).is_file():
        raise ValueError(f"output_dir {path} is not an export of ours: not overwritten")
    if holds_run(path) or path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"output_dir {path} holds more than an export: not overwritten")


def check_apart(source: Source, path: Path) -> None:
    """Raise if replacing `path` would remove what is exported."""
    for place in (source.folder, source.model, str(source.run or source.folder)):
        given = Path(place).expanduser()
        if given.exists() and path.resolve() in (given.resolve(), *given.resolve().parents):
            raise ValueError(f"output_dir {path} holds the model to be exported, {given}")


def write_export(
    source: Source,
    folder: Path,
    *,
    dtype: str | None = None,
    tokenizer: Any = None,
    **card: Any,
) -> None:
    """All files of an export into an empty folder; `card` is what `write_card` takes."""
    model = load_merged(source, dtype)
    folder.mkdir(parents=True)
    _save_model(model, source, folder)
    (tokenizer if tokenizer is not None else load_own_tokenizer(source)).save_pretrained(folder)
    write_card(source, model, folder / "README.md", **card)


def staging_of(path: Path) -> Path:
    """The folder beside `path` that an export is written to, with nothing in it."""
    staged = path.with_name(f"_exporting-{path.name}")
    shutil.rmtree(staged, ignore_errors=True)
    return staged


def export_model(
    model_name_or_path: str,
    output_dir: str | Path,
    *,
    dtype: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    evaluation: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a checkpoint as one whole model with a tokenizer and a model card.

        model = PeftModel.from_pretrained(base, checkpoint).merge_and_unload()  # if an adapter
        model.save_pretrained(output_dir)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output_dir)

    Args:
        model_name_or_path: a run's folder (its final model, else its newest whole checkpoint), its
            `model/` or `checkpoint-N/`, a model's or adapter's folder, or a Hub id.
        output_dir: must be new or empty; with `overwrite`, an earlier export.
        dtype: float32, bfloat16 or float16; by default as saved (of an adapter, as its base).
        license, base_model: for the card; by default what the run and its student tell.
        evaluation: a JSON file of `dudi evaluate --output`; by default the run's evaluation.json.

    Raises:
        ValueError: a checkpoint that is not there, not whole or not finite, or a bad option.
        DiskError: the folder could not be written; nothing is left of it.
    """
    check_dtype(dtype)
    source, path = find_source(model_name_or_path), Path(output_dir)
    check_target(path, overwrite)
    check_apart(source, path)
    read_evaluations(evaluation, source.run)  # found out before a large model is loaded
    staged = staging_of(path)
    try:
        with disk_errors(path):
            write_export(
                source,
                staged / path.name,
                dtype=dtype,
                license=license,
                base_model=base_model,
                evaluation=evaluation,
            )
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            seal(staged / path.name, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if console is not None:
        console.print(f"Exported {source.folder} to {path}", soft_wrap=True)
    return path


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
