"""`evaluate_tasks`: a model, tasks, a teacher if there is one, and out comes a `Result`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dudi.bridge import Bridge
from dudi.evaluation.bootstrap import RESAMPLES
from dudi.evaluation.calibration import binned
from dudi.evaluation.choices import answer_choices
from dudi.evaluation.encoding import Encoder
from dudi.evaluation.items import ALL, Item, described, task_items
from dudi.evaluation.result import Result, TaskResult, versions
from dudi.evaluation.scoring import Score, Scorer, batches, check_ids
from dudi.evaluation.sources import Absent
from dudi.evaluation.task import Task, load_tasks
from dudi.evaluation.writing import judges, write, written_values
from dudi.intervals import or_none
from dudi.known import KnownTeacher
from dudi.rollout import inference_mode_of
from dudi.signals import check_padding_free
from dudi.verbalize import normalise
from dudi_kernels.plan import DEFAULT_BUDGET

Progress = Callable[[str, int, int], None]  # task, rows done, rows to do
LIKELIHOODS = {"nll", "kl", "calibration"}  # metrics of given texts


@dataclass(frozen=True)
class _Run:
    """What all tasks are evaluated with."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    scorer: Scorer
    batch_size: int
    generate_rows: int | None
    max_completion_length: int


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task | str | Path],
    *,
    name: str = "model",
    teacher: Any = None,
    bridge: Bridge | None = None,
    languages: Collection[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    batch_size: int = 16,
    generate_rows: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int = 128,
    padding_free: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Evaluate a causal LM on tasks: for each language and in the mean, with intervals.

    Replaces, for each row of each task, with q the model's distribution and p the teacher's::

        logits = model(prompt_ids + completion_ids).logits[len(prompt_ids) - 1 : -1].float()
        nll = cross_entropy(logits, completion_ids, reduction="sum")
        kl = (p * (p.log() - q.log())).sum()
        chosen = argmax(log_prob(choice) for choice in choices)

    and chrF++ of greedy generations. No logits are made but those that generating needs.

    Args:
        tasks: `Task`s, paths of YAML files, names of built-in ones, or "all" for these.
        name: of the model in tables and comparisons.
        teacher, bridge: as for `dudi.evaluate.evaluate_model`.
        languages: the rows of these alone; None is all.
        seed, resamples: of the bootstrap; results that are compared must have the same.
        generate_rows: the first items of each language that are generated; None is all.
        max_prompt_length, max_completion_length: tokens; longer ones are cut, choices never.
        padding_free: run the bodies without padding.
        data_dir: where `dudi eval-data` has put its files.
        progress: called with a task's name, rows done and rows to do.

    Returns:
        `Result`; a task whose data is absent is in `skipped`, with the reason.

    Raises:
        ValueError: a task that can't be read, or a row that can't, named.
    """
    loaded = load_tasks(tasks)
    _check(batch_size, generate_rows, max_prompt_length, max_completion_length, resamples)
    if padding_free:
        check_padding_free(model, "model")
        if teacher is not None and not isinstance(teacher, KnownTeacher):
            check_padding_free(teacher, "teacher")
    run = _run(
        model, tokenizer, teacher, bridge, batch_size, generate_rows, max_completion_length,
        max_prompt_length, padding_free, memory_budget, chat_template_kwargs,
    )  # fmt: skip
    result = Result(name, {}, settings={
        "seed": seed, "resamples": resamples, "batch_size": batch_size,
        "generate_rows": generate_rows, "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length, "padding_free": padding_free,
        "chat_template_kwargs": dict(chat_template_kwargs or {}),
        "languages": None if languages is None else sorted(languages),
        "tasks": [task.model_dump(exclude_none=True) for task in loaded],
    }, versions=versions())  # fmt: skip
    with inference_mode_of(model), inference_mode_of(model if teacher is None else teacher):
        for task in loaded:
            try:
                items = task_items(task, languages, data_dir)
            except Absent as reason:
                result.skipped[task.name] = str(reason)
                continue
            own = _evaluate(run, task, items, _teller(task.name, progress))
            own.seed, own.resamples = seed, resamples
            lacking = {normalise(code) for code in languages or ()} - set(own.languages)
            if lacking:
                own.notes.append(f"there are no rows in {', '.join(sorted(lacking))}")
            result.tasks[task.name] = own
    return result


def _check(
    batch_size: int,
    generate_rows: int | None,
    max_prompt_length: int | None,
    max_completion_length: int,
    resamples: int,
) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("generate_rows", generate_rows or 0, 0),
        ("max_prompt_length", 1 if max_prompt_length is None else max_prompt_length, 1),
        ("max_completion_length", max_completion_length, 1),
        ("resamples", resamples, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _run(
    model: Any,
    tokenizer: Any,
    teacher: Any,
    bridge: Bridge | None,
    batch_size: int,
    generate_rows: int | None,
    max_completion_length: int,
    max_prompt_length: int | None,
    padding_free: bool,
    memory_budget: int,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> _Run:
    device = next(model.parameters()).device
    bridge = (Bridge(tokenizer) if bridge is None else bridge).to(device)
    other = None if bridge.pairing is None else bridge.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encoder = Encoder.of(
        tokenizer, other, chat_template_kwargs, max_prompt_length, max_completion_length
    )
    scorer = Scorer(model, pad, teacher, bridge, padding_free, memory_budget)
    return _Run(model, tokenizer, encoder, scorer, batch_size, generate_rows, max_completion_length)


def _teller(name: str, progress: Progress | None) -> Callable[[int, int], Callable[[int], None]]:
    """Makes, for so many rows of which some are done, what counts further ones."""

    def start(done: int, total: int) -> Callable[[int], None]:
        def tell(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(name, done, total)

        return tell

    return start


def _evaluate(
    run: _Run, task: Task, items: list[Item], start: Callable[[int, int], Callable[[int], None]]
) -> TaskResult:
    result = TaskResult(task.name, task.about, described(task, items), _labels(items))
    if task.choices is not None:
        tell = start(0, len(items))
        own = _choose(run, task, items, tell)
        for row, values in zip(result.rows, own, strict=True):
            row.update(values)
        result.notes += _not_finite(result.rows)
        return result
    chosen = _first(items, run.generate_rows) if task.writes else []
    rows = _encoded(run.encoder, task, items)
    for values, row in zip(result.rows, rows, strict=True):
        values.update(_left_out(run, task, row))
    check_ids(run.scorer, rows, task.name)
    _score(run, task, rows, result, start(0, len(items) + len(chosen)))
    result.notes += _not_finite(result.rows)
    tell = start(len(items), len(items) + len(chosen))
    _write(run, task, items, rows, chosen, result, tell)
    return result


def _left_out(run: _Run, task: Task, row: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens the limits cut of what the task's figures are made of."""
    found = dict(row["left_out"])
    if LIKELIHOODS.isdisjoint(task.metrics):
        del found["completion_left_out"]  # generations are compared with the whole reference
    if not _asks(run, task):
        found.pop("teacher_prompt_left_out", None)
    return found


def _asks(run: _Run, task: Task) -> bool:
    """Whether the teacher is asked."""
    return "kl" in task.metrics and run.scorer.teacher is not None


def _labels(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [{"row": i.row, "language": i.language, "group": i.group} for i in items]


def _encoded(encoder: Encoder, task: Task, items: Sequence[Item]) -> list[dict[str, Any]]:
    rows = []
    for item in items:
        try:
            rows.append(
                encoder.row(
                    item.prompt,
                    item.completion,
                    chat=task.chat,
                    ends=task.ends,
                    example=item.example,
                )
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"task {task.name}, row {item.row}: {error}") from error
    return rows


def _choose(
    run: _Run, task: Task, items: list[Item], tell: Callable[[int], None]
) -> list[dict[str, Any]]:
    own = answer_choices(items, task, run.encoder, _alone(run.scorer), run.batch_size, tell)
    if "calibration" not in task.metrics:
        for values in own:
            del values["choice_bins"]
    if "accuracy" not in task.metrics:
        for values in own:
            del values["correct"], values["correct_by_bytes"]
    return own


def _score(
    run: _Run,
    task: Task,
    rows: Sequence[dict[str, Any]],
    result: TaskResult,
    tell: Callable[[int], None],
) -> None:
    wanted: set[str] = set(task.metrics)
    if wanted.isdisjoint(LIKELIHOODS):
        tell(len(rows))
        return
    asks = _asks(run, task)
    scorer = run.scorer if asks else _alone(run.scorer)
    for part in batches(rows, run.batch_size, tell):
        scores = scorer.score([rows[i] for i in part], "calibration" in wanted)
        for i, score in zip(part, scores, strict=True):
            result.rows[i].update(_scored_values(score, rows[i], wanted, asks))


def _alone(scorer: Scorer) -> Scorer:
    return replace(scorer, teacher=None, bridge=None)


def _scored_values(
    score: Score, row: Mapping[str, Any], wanted: set[str], asks: bool
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "nll" in wanted:
        text = row["text"]
        values |= {"nll": or_none(score.nll), "tokens": len(row["completion_ids"])}
        values |= {"chars": len(text), "bytes": len(text.encode())}
    if asks:
        values |= {"kl": or_none(score.kl), "taught": score.taught}
    if score.confidence is not None and score.right is not None:
        values["token_bins"] = binned(score.confidence, score.right)
    return values


def _not_finite(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note where a likelihood is NaN or infinite: its language's figures are not measured."""

    def lacks(value: Any) -> bool:
        return value is None or (isinstance(value, list) and any(map(lacks, value)))

    names = ("nll", "kl", "token_bins", "correct", "choice_bins")
    bad = Counter(r["language"] for r in rows if any(lacks(r[n]) for n in names if n in r))
    if not bad:
        return []
    own = ", ".join(f"{code} {count}" for code, count in sorted(bad.items()))
    return [f"likelihoods of {bad.total()} rows are not finite ({own}): nothing is told of them"]


def _first(items: Sequence[Item], limit: int | None) -> list[int]:
    """Numbers of the first items of each language."""
    taken: dict[str, int] = defaultdict(int)
    chosen = []
    for i, item in enumerate(items):
        taken[item.language] += 1
        if limit is None or taken[item.language] <= limit:
            chosen.append(i)
    return chosen


def _write(
    run: _Run,
    task: Task,
    items: Sequence[Item],
    rows: Sequence[dict[str, Any]],
    chosen: Sequence[int],
    result: TaskResult,
    tell: Callable[[int], None],
) -> None:
    if not chosen:
        return
    written = write(
        run.model, run.tokenizer, [rows[i] for i in chosen], run.scorer.pad, run.batch_size,
        run.max_completion_length, tell,
    )  # fmt: skip
    judge = judges([item.language for item in items]) if "fidelity" in task.metrics else {}
    for i, (text, ended) in zip(chosen, written, strict=True):
        item = items[i]
        own = written_values(item, text, task.metrics, judge)
        result.rows[i].update(own | {"unended": int(not ended)})
        result.samples.append(
            {
                "language": item.language,
                "row": item.row,
                "prompt": item.prompt,
                "reference": item.completion,
                "generation": text,
            }
        )
    reasons = {own.reason for code, own in judge.items() if own.reason and code != ALL}
    result.notes += [f"fidelity was not measured: {reason}" for reason in sorted(reasons)]
