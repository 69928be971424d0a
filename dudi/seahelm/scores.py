"""Task -> competency -> language -> SEA, in every run, then means and intervals over the runs.

    competency = mean of its tasks        (those of a group, as translation's two, averaged first)
    language   = mean of its competencies
    SEA        = mean of its languages    (id, vi, th, ta, tl, ms, my: those that were run)

as docs/score_calculations.md of SEA-HELM has it: each level is aggregated within a run, so that the
spread over runs is that of the level itself. Intervals are 95 %, Student's t over the runs.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dudi.intervals import LEVEL, Mean, t_quantile
from dudi.seahelm.facts import Task, facts
from dudi.seahelm.results import RESULT_FILE, Run, Score, newest_finished, read_run, result_files

Node = tuple[str, ...]  # (), (language,), (language, competency), (..., task or group[, task])
SEA: Node = ()


def mean_of(values: Iterable[float]) -> Mean:
    """mean +- t sd / sqrt(n), by runs."""
    runs = tuple(values)
    n = len(runs)
    if n < 2:
        return Mean(runs[0], math.nan, runs)
    half = t_quantile(LEVEL, n - 1) * statistics.stdev(runs) / math.sqrt(n)
    return Mean(statistics.fmean(runs), half, runs)


@dataclass
class Model:
    """All runs of a model: every node of the tree with its mean."""

    name: str
    runs: list[Run]
    nodes: dict[Node, Mean]
    scores: dict[tuple[str, str], Score]  # of the first run, for baselines and maxima
    plain: dict[tuple[str, str], Mean]  # scores before they are normalised
    notes: list[str]

    @property
    def languages(self) -> list[str]:
        return [node[0] for node in self.nodes if len(node) == 1]

    def children(self, node: Node) -> list[Node]:
        n = len(node)
        return [other for other in self.nodes if len(other) == n + 1 and other[:n] == node]

    def recorded(self, language: str) -> float | None:
        """SEA-HELM's own total of a language ('': of all), a mean over the runs."""
        totals = [run.totals[language] for run in self.runs if language in run.totals]
        return statistics.fmean(totals) if len(totals) == len(self.runs) else None


# ---- one run -------------------------------------------------------------------------------------


def aggregate(scores: dict[tuple[str, str], float], tasks: dict[str, Task]) -> dict[Node, float]:
    """Every node of one run's tree, from its normalised task scores."""
    nodes: dict[Node, float] = {}
    for (language, name), value in scores.items():
        task = tasks[name]
        group = (task.group,) if task.group else ()
        node: Node = (language, task.competency, *group, name)
        nodes[node] = value
    for depth in (3, 2, 1):  # groups, competencies, languages
        below = defaultdict(list)
        for node, value in nodes.items():
            if len(node) == depth + 1:
                below[node[:depth]].append(value)
        nodes |= {node: statistics.fmean(values) for node, values in below.items()}
    in_sea = [nodes[code,] for code in facts()["sea_languages"] if (code,) in nodes]
    if in_sea:
        nodes[SEA] = statistics.fmean(in_sea)
    return nodes


# ---- several runs --------------------------------------------------------------------------------


def combine(name: str, runs: list[Run]) -> Model:
    """Means and intervals over the runs of a model; their tasks must be the same.

    Raises:
        ValueError: runs with other tasks, or several runs of one number.
    """
    runs = sorted(runs, key=lambda run: run.number)
    numbers = [run.number for run in runs]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} has two runs of one number: {', '.join(map(str, numbers))}")
    filled = _fill(name, runs)
    trees = [
        aggregate({key: s.value for key, s in scores.items()}, run.tasks)
        for run, scores in zip(runs, filled, strict=True)
    ]
    return Model(
        name,
        runs,
        {node: mean_of(tree[node] for tree in trees) for node in trees[0]},
        filled[0],
        {key: mean_of(scores[key].score for scores in filled) for key in filled[0]},
        _notes(runs),
    )


def _fill(name: str, runs: list[Run]) -> list[dict[tuple[str, str], Score]]:
    """Scores by run; what SEA-HELM does in the first run alone stands for all."""
    once = {k: s for run in runs[::-1] for k, s in run.scores.items() if run.tasks[k[1]].once}
    filled = [once | run.scores for run in runs]
    for run, scores in zip(runs[1:], filled[1:], strict=True):
        differing = sorted("/".join(key) for key in filled[0].keys() ^ scores.keys())
        if differing:
            raise ValueError(
                f"runs {runs[0].number} and {run.number} of {name} differ in their tasks: "
                + ", ".join(differing)
            )
    return filled


def _notes(runs: list[Run]) -> list[str]:
    notes = dict.fromkeys(note for run in runs for note in run.notes)
    seeds = [run.seed for run in runs if run.seed is not None]
    if len(set(seeds)) < len(seeds):
        notes[f"seeds are not distinct: {', '.join(map(str, seeds))}"] = None
    for run in runs:
        if run.limit is not None:
            notes[f"run {run.number} was limited to {run.limit} rows a task: no real score"] = None
    commits = sorted({str(run.commit) for run in runs if run.commit})
    if len(commits) > 1:
        notes[f"runs are of several versions of SEA-HELM: {', '.join(commits)}"] = None
    return list(notes)


# ---- several models ------------------------------------------------------------------------------


def collect(places: Iterable[str | Path]) -> list[Model]:
    """The models whose results are in folders (or result files), as they are met.

    Raises:
        FileNotFoundError: no such place.
        ValueError: a place without a finished run, or a file that does not fit.
    """
    runs: dict[Path, dict[Path, Path]] = {}  # by model's folder and run's folder
    unfinished: dict[Path, list[str]] = defaultdict(list)
    for place in places:
        for folder, file in _finished(Path(place), unfinished).items():
            runs.setdefault(folder.parent, {})[folder] = file
    labels = _labels(list(runs))
    models = []
    for folder, files in runs.items():
        model = combine(labels[folder], [read_run(file) for file in files.values()])
        model.notes += unfinished[folder]
        models.append(model)
    return models


def _finished(place: Path, unfinished: dict[Path, list[str]]) -> dict[Path, Path]:
    """Result files by run folder."""
    place = place.absolute()
    if place.is_file():
        if RESULT_FILE.fullmatch(place.name) is None:
            raise ValueError(
                f"results must be folders or files MODEL_seahelm_results_TIME.json, got {place}"
            )
        return {place.parent.parent: place}
    if not place.is_dir():
        raise FileNotFoundError(f"results {place} does not exist")
    found = {}
    folders = dict.fromkeys(file.parent.parent for file in result_files(place))
    for folder in folders:
        newest = newest_finished(folder)
        if newest is None:
            unfinished[folder.parent].append(f"{folder.name} has not ended: left out")
        else:
            found[folder] = newest
    if not found:
        told = "no finished run" if folders else "no result file"
        raise ValueError(f"results {place} has {told} run_N/results/*_seahelm_results_*.json")
    return found


def _labels(folders: list[Path]) -> dict[Path, str]:
    """Each model's name; with as many folders before it as tell equal names apart."""
    depth = 1
    while True:
        labels = {folder: "/".join(folder.parts[-depth:]) for folder in folders}
        if len(set(labels.values())) == len(folders):
            return labels
        depth += 1
