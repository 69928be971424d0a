"""SEA-HELM's result files, read and checked.

    OUTPUT/MODEL/run_N/results/MODEL_seahelm_results_TIME.json
        {language: {competency: {task: {figure: number, ...}, "total"}, "total"}, "total"}
    OUTPUT/MODEL/run_N/configs/MODEL_run_config_TIME.yaml
        tasks: {task: {competency, metric, ...}}, seed, run_args, run_env

(`write_metric_to_file`, `save_config` of src/seahelm_evaluation.py, `aggregate_metrics` of
src/aggregate_metrics.py.) The file is written again after every task and gets its totals last, so
one without a total is of a run that has not ended. What does not fit is an error that names the
file and the place in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dudi.callbacks import checked_object
from dudi.seahelm.facts import Task, baseline_of, metrics, normalise, tasks

RESULT_FILE = re.compile(r"(.+)_seahelm_results_(.+)\.json")
RUN_FOLDER = re.compile(r"run_(\d+)")
DERIVED = ("lindsea", "total")  # put together of other entries
AGREEMENT = 1e-3  # points of 100: figures are written in full


@dataclass(frozen=True)
class Score:
    """One task in one language and run."""

    score: float  # plain, as the metric has it
    baseline: float
    maximum: float
    value: float  # normalised, 0 to 100
    failed: bool = False  # SEA-HELM could not evaluate it, and counts 0


@dataclass
class Run:
    """One finished run of one model."""

    model: str
    number: int
    file: Path
    seed: int | None = None
    commit: str | None = None
    limit: int | None = None
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)  # by language and task
    tasks: dict[str, Task] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)  # SEA-HELM's own, by language; "": all
    notes: list[str] = field(default_factory=list)


# ---- files ---------------------------------------------------------------------------------------


def result_files(path: Path) -> list[Path]:
    """All result files of a run folder or of one above it, oldest first."""
    found = (p for p in path.rglob("*.json") if RESULT_FILE.fullmatch(p.name))
    own = (p for p in found if p.parent.name == "results" and _run_number(p) is not None)
    return sorted(own, key=lambda p: (str(p.parent), _time(p)))


def _run_number(path: Path) -> int | None:
    match = RUN_FOLDER.fullmatch(path.absolute().parent.parent.name)
    return int(match[1]) if match else None


def _time(path: Path) -> str:
    match = RESULT_FILE.fullmatch(path.name)
    return match[2] if match else ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    return checked_object(content, str(path))


def is_finished(content: dict[str, Any]) -> bool:
    return "total" in content


def newest_finished(run_folder: Path) -> Path | None:
    """The newest result file of a run that has its totals."""
    files = [p for p in result_files(run_folder) if p.parent.parent == run_folder]
    return next((p for p in reversed(files) if is_finished(_read_or_none(p))), None)


def _read_or_none(path: Path) -> dict[str, Any]:
    """A file that a killed run cut short counts as unfinished."""
    try:
        return read_json(path)
    except ValueError:
        return {}


def failed_tasks(content: dict[str, Any]) -> list[str]:
    """`language/task` of what SEA-HELM could not evaluate."""
    return [
        f"{language}/{name}"
        for language, competencies in content.items()
        if isinstance(competencies, dict)
        for entries in competencies.values()
        if isinstance(entries, dict)
        for name, entry in entries.items()
        if isinstance(entry, dict) and "error" in entry
    ]


# ---- one run -------------------------------------------------------------------------------------


def read_run(path: Path) -> Run:
    """A finished run from its result file, and the configuration beside it where there is one."""
    match, number = RESULT_FILE.fullmatch(path.name), _run_number(path)
    if match is None or number is None:
        raise ValueError(
            f"results must be run_N/results/MODEL_seahelm_results_TIME.json, got {path}"
        )
    content = read_json(path)
    if not is_finished(content):
        raise ValueError(f"{path} has no total: the run has not ended")
    run = Run(match[1], number, path)
    _read_config(run, path.parent.parent / "configs" / f"{match[1]}_run_config_{match[2]}.yaml")
    run.totals[""] = _number(content.pop("total"), f"{path}: total")
    for language, competencies in content.items():
        _read_language(run, language, checked_object(competencies, f"{path}: {language}"))
    if not run.scores:
        raise ValueError(f"{path} has no task")
    return run


def _read_config(run: Run, path: Path) -> None:
    """Seed, version and limit; and the tasks that our table lacks."""
    run.tasks = dict(tasks())
    if not path.exists():
        run.notes.append(f"run {run.number} has no {path.name}: its seed is not known")
        return
    try:
        config = checked_object(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must hold YAML: {error}") from error
    run.seed = config.get("seed")
    run.commit = (config.get("run_env") or {}).get("seahelm_git_hash")
    run.limit = (config.get("run_args") or {}).get("limit")
    for name, task in checked_object(config.get("tasks"), f"{path}: tasks").items():
        known = checked_object(task, f"{path}: tasks > {name}")
        if not {"competency", "metric"} <= known.keys():
            raise ValueError(f"{path}: tasks > {name} must have competency and metric")
        if name not in run.tasks:
            run.tasks[name] = Task(
                name,
                known["competency"],
                known["metric"],
                known.get("aggregation_group"),
                once=known.get("max_n_runs") == 1,
            )


def _read_language(run: Run, language: str, competencies: dict[str, Any]) -> None:
    for competency, entries in competencies.items():
        place = f"{run.file}: {language} > {competency}"
        if competency == "total":
            run.totals[language] = _number(entries, place)
            continue
        for name, entry in _entries(run, checked_object(entries, place)):
            task = run.tasks.get(name)
            if task is None:
                raise ValueError(
                    f"{place} > {name} is in neither the run's configuration nor the tasks known "
                    "of SEA-HELM"
                )
            if task.competency != competency:
                raise ValueError(f"{place} > {name} belongs to {task.competency}")
            entry = checked_object(entry, f"{place} > {name}")
            run.scores[language, name] = _score(run, task, language, entry, f"{place} > {name}")


def _entries(run: Run, entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tasks, without what is put together of others or is part of one."""
    groups = {task.group for task in run.tasks.values()}
    parts = {part for task in run.tasks.values() for part in task.parts}
    for name, entry in entries.items():
        if name not in DERIVED and name not in parts and name not in groups:
            yield name, entry


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{place} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{place} must be finite, got {value}")
    return float(value)


# ---- one score -----------------------------------------------------------------------------------


def _score(run: Run, task: Task, language: str, entry: dict[str, Any], place: str) -> Score:
    metric = metrics().get(task.metric)
    if "error" in entry:
        run.notes.append(f"run {run.number}: {language}/{task.name} failed and counts 0")
        worst = 0.0 if metric is None else baseline_of(task, language) or 0.0
        return Score(worst, worst, 100.0 if metric is None else metric.maximum, 0.0, failed=True)
    for key in (task.metric, *([metric.score] if metric else [])):
        if key not in entry:
            raise ValueError(f"{place} must have {key!r}, has {', '.join(entry) or 'nothing'}")
    recorded = _number(entry[task.metric], f"{place} > {task.metric}")
    if metric is None:
        run.notes.append(f"{task.name}: {task.metric} is taken as it is, from 0 to 100")
        return Score(recorded, 0.0, 100.0, recorded)
    score = _number(entry[metric.score], f"{place} > {metric.score}")
    low, high = sorted((metric.maximum, metric.baseline or 0.0))
    if not low - AGREEMENT <= score <= high + AGREEMENT:
        raise ValueError(f"{place} > {metric.score} must be in [{low:g}, {high:g}], got {score:g}")
    baseline = baseline_of(task, language)
    if not metric.normalised:
        return _unrecorded(run, task, language, score, baseline, metric.maximum)
    if baseline is not None and _agrees(normalise(score, baseline, metric.maximum), recorded):
        return Score(score, baseline, metric.maximum, recorded)
    return _disagreeing(run, task, language, score, baseline, metric.maximum, recorded)


def _agrees(value: float, recorded: float) -> bool:
    return abs(value - recorded) <= AGREEMENT


def _unrecorded(
    run: Run, task: Task, language: str, score: float, baseline: float | None, maximum: float
) -> Score:
    if baseline is None:
        run.notes.append(
            f"{language}/{task.name}: how many options is not known, 0 is the baseline"
        )
        baseline = 0.0
    return Score(score, baseline, maximum, normalise(score, baseline, maximum))


def _disagreeing(
    run: Run,
    task: Task,
    language: str,
    score: float,
    baseline: float | None,
    maximum: float,
    recorded: float,
) -> Score:
    """The file's own figure counts: SEA-HELM has seen the labels. Its baseline is told."""
    if recorded > 0 and recorded < 100:
        # recorded / 100 = (score - b) / (maximum - b), solved for b
        own = (score - recorded / 100 * maximum) / (1 - recorded / 100)
    else:
        own = score if recorded == 0 else baseline or 0.0
    if baseline is not None:
        run.notes.append(
            f"{language}/{task.name}: normalised from a baseline of {own:.4g} by SEA-HELM, where "
            f"{baseline:.4g} was expected; its figure is kept"
        )
    return Score(score, own, maximum, recorded)
