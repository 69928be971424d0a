"""Reading a run's folder for the report: what it has, checked, and nothing where a file is missing.

`collect` takes a run's folder or a demo's, which holds several runs. Their log events are grouped
by run; a run that was killed while it wrote a line loses that line and no more. Whatever cannot be
read is an error that names the file (and line).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dudi.callbacks import METRICS_FILE, checked_object, read_jsonl

FILES = ("run.json", METRICS_FILE, "evaluation.json", "summary.json")


@dataclass
class Collected:
    """What a run folder holds; empty where it holds nothing."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by run; "" if single
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by run


def collect(run_dir: str | Path) -> Collected:
    """Read a run folder or a demo's folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without any of a run's files, or a file that cannot be parsed.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run_dir must be a folder, got {folder}, which is none")
    children = _children(folder)
    found = Collected(
        folder,
        info=_read_json(folder / "run.json"),
        metrics=_metrics(folder, children),
        evaluations=_read_json(folder / "evaluation.json"),
        summary=_read_json(folder / "summary.json"),
    )
    for label, evaluation in found.evaluations.items():
        checked_object(evaluation, f"{label!r} of {folder / 'evaluation.json'}")
    found.settings = _settings(found.info, children)
    if not (found.info or found.metrics or found.evaluations or found.summary):
        raise ValueError(
            f"run_dir must hold one of {', '.join(FILES)} with something in it, got {folder}"
        )
    return found


def _children(folder: Path) -> dict[str, Path]:
    """Run folders inside a demo's folder, in the order in which they were begun."""
    runs = [p.parent for p in folder.glob("*/run.json")]
    begun = {run: str(_read_json(run / "run.json").get("started", "")) for run in runs}
    return {run.name: run for run in sorted(runs, key=lambda run: (begun[run], run.name))}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    return checked_object(content, str(path))


def _metrics(folder: Path, children: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Log events by run: of the folder's own file, or of each run inside where it has none."""
    own = read_jsonl(folder / METRICS_FILE)
    if not own:
        inner = {name: read_jsonl(path / METRICS_FILE) for name, path in children.items()}
        return {name: records for name, records in inner.items() if records}
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in own:
        grouped[str(record.get("run", ""))].append(record)
    return dict(grouped)


def _settings(info: dict[str, Any], children: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Options by run."""
    if children:
        infos = {name: _read_json(path / "run.json") for name, path in children.items()}
    else:
        infos = {"": info}
    merged = {}
    for name, own in infos.items():
        parts = [own.get(key) or {} for key in ("script", "config")]
        for part in parts:
            checked_object(part, f"script and config in the run.json of {name or 'the run'}")
        merged[name] = parts[0] | parts[1]
    return {name: options for name, options in merged.items() if options}
