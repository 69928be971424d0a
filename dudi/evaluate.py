"""Held-out figures for each language: likelihood, divergence from the teacher, translation quality.

Negative log-likelihood and KL come from the fused kernels over the reference's tokens (its eos
included), both models under the student's own prompt; no logits exist. A teacher with another
tokenizer reads prompt and reference in its own tokens; KL is then over the rows that both have.
chrF (sacrebleu) compares greedy generations with the references. Sums are kept by language; a mean
over languages gives each the same weight. Rows are batched by length: batch_size changes speed, not
figures. This is what trainer and demo need on the way, of a prepared dataset; `dudi.evaluation` has
tasks, intervals and comparisons.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Column, Table
from sacrebleu.metrics.chrf import CHRF

from dudi.bridge import Bridge
from dudi.data import COLUMNS
from dudi.evaluation.scoring import Scorer, batches, check_vocabulary, tensors
from dudi.rollout import generate, inference_mode_of

Progress = Callable[[int, int], None]
ALL = "all"  # the label of rows without a language
FIGURES = {"nll_per_char": 3, "nll_per_token": 3, "kl_to_teacher": 3, "chrf": 1}  # and digits
TITLES = ("NLL / char", "NLL / token", "KL to teacher", "chrF")


@dataclass
class Evaluation:
    """Figures by language and their unweighted mean; samples of what the model wrote."""

    languages: dict[str, dict[str, float]]
    mean: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: what could not be measured is None."""
        return {
            "languages": {name: _json_safe(v) for name, v in self.languages.items()},
            "mean": _json_safe(self.mean),
            "samples": self.samples,
        }


def _json_safe(values: dict[str, float]) -> dict[str, float | None]:
    return {key: v if math.isfinite(v) else None for key, v in values.items()}


def _chars(tokenizer: Any, row: dict[str, Any]) -> int:
    """Characters that the scored tokens spell: all, unless the reference was truncated."""
    if row["completion_ids"][-1] == tokenizer.eos_token_id:
        return len(row["completion_text"])
    return len(tokenizer.decode(row["completion_ids"], skip_special_tokens=True))


def _likelihoods(
    scorer: Scorer,
    tokenizer: Any,
    dataset: list[dict[str, Any]],
    batch_size: int,
    tell: Callable[[int], None],
) -> dict[str, dict[str, float]]:
    """Figures by language; chrF is still unknown."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in batches(dataset, batch_size, tell):
        rows = [dataset[i] for i in part]
        for row, score in zip(rows, scorer.score(rows), strict=True):
            own = totals[row["language"] or ALL]
            own["rows"] += 1
            own["tokens"] += len(row["completion_ids"])
            own["chars"] += _chars(tokenizer, row)
            own["nll"] += score.nll
            own["kl"] += score.kl
            own["taught"] += score.taught
    return {
        language: {
            "nll_per_char": own["nll"] / max(own["chars"], 1),
            "nll_per_token": own["nll"] / own["tokens"],
            "kl_to_teacher": own["kl"] / own["taught"] if own["taught"] else math.nan,
            "chrf": math.nan,
            "rows": own["rows"],
            "tokens": own["tokens"],
            "chars": own["chars"],
        }
        for language, own in sorted(totals.items())
    }


def _first_rows(dataset: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` rows of each language; None is all."""
    taken: dict[str, int] = defaultdict(int)
    chosen = []
    for row in dataset:
        taken[row["language"]] += 1
        if limit is None or taken[row["language"]] <= limit:
            chosen.append(row)
    return chosen


def _generations(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    batch_size: int,
    max_length: int,
    tell: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Greedy generations beside their references, in the dataset's order."""
    samples = []
    for part in batches(rows, batch_size, tell):
        batch = [rows[i] for i in part]
        rollout = generate(
            model,
            tensors(batch, "prompt_ids"),
            max_completion_length=max_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=_pad(tokenizer),
            temperature=0.0,
        )
        for row, completion in zip(batch, rollout.completions, strict=True):
            samples.append(
                {
                    "language": row["language"] or ALL,
                    "row": row["row"],
                    "prompt": row["prompt_text"],
                    "reference": row["completion_text"],
                    "generation": tokenizer.decode(completion, skip_special_tokens=True),
                }
            )
    return sorted(samples, key=lambda sample: sample["row"])


def _chrf(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Corpus chrF by language."""
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        grouped[sample["language"]].append(sample)
    return {
        language: CHRF()
        .corpus_score([s["generation"] for s in own], [[s["reference"] for s in own]])
        .score
        for language, own in grouped.items()
    }


def _pad(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Adds up what is done and tells `progress`."""
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tell


def _check(
    model: Any,
    teacher: Any,
    bridge: Bridge,
    rows: list[Any],
    batch_size: int,
    limit: int | None,
) -> None:
    if not rows:
        raise ValueError("dataset must not be empty")
    missing = [name for name in COLUMNS if name not in rows[0]]
    if missing:
        raise ValueError(
            f"dataset must come from dudi.data.prepare_dataset, got one without {missing[0]}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None and limit < 0:
        raise ValueError(f"generate_rows must not be negative, got {limit}")
    largest = max(max(row["prompt_ids"] + row["completion_ids"]) for row in rows)
    check_vocabulary(model, teacher, bridge, largest, "dataset")


def evaluate_model(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    *,
    teacher: Any = None,
    bridge: Bridge | None = None,
    batch_size: int = 16,
    generate: bool = True,
    generate_rows: int | None = None,
    max_completion_length: int = 128,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a causal LM on a prepared dataset (`dudi.data.prepare_dataset`).

    Replaces, for each row, with q the model's and p the teacher's distributions::

        logits = model(prompt_ids + completion_ids).logits[len(prompt_ids) - 1 : -1].float()
        nll = cross_entropy(logits, completion_ids, reduction="sum")
        kl = (p * (p.log() - q.log())).sum()

    and `CHRF().corpus_score` of each language's greedy generations.

    Args:
        teacher: for `kl_to_teacher`, forward KL(teacher || model) in nats a token on the
            references, both under the student's prompt; NaN without one, 0 for the teacher itself.
        bridge: `dudi.bridge.build_bridge` of a teacher with another tokenizer or size of head,
            which the dataset was prepared with; KL is then between the classes of its map, over
            the tokens that pair.
        generate: also write completions greedily and score them with chrF.
        generate_rows: the first rows of each language that are generated; None is all.
        max_completion_length: tokens of a generation.
        progress: called with rows done and rows to do, scored and generated ones together.

    Returns:
        `Evaluation`; figures in nats a character or token of the reference, chrF from 0 to 100.
        Both models get their training mode back.

    Raises:
        ValueError: a dataset that is empty, not prepared, or of another tokenizer's ids; a teacher
            of another vocabulary.
    """
    rows = list(dataset)
    bridge = Bridge(tokenizer) if bridge is None else bridge
    _check(model, teacher, bridge, rows, batch_size, generate_rows)
    bridge = bridge.to(next(model.parameters()).device)
    chosen = _first_rows(rows, generate_rows) if generate else []
    tell = _counter(len(rows) + len(chosen), progress)
    with inference_mode_of(model), inference_mode_of(model if teacher is None else teacher):
        scorer = Scorer(model, _pad(tokenizer), teacher, bridge)
        figures = _likelihoods(scorer, tokenizer, rows, batch_size, tell)
        samples = _generations(model, tokenizer, chosen, batch_size, max_completion_length, tell)
    for language, score in _chrf(samples).items():
        figures[language]["chrf"] = score
    names = next(iter(figures.values())).keys()
    mean = {name: sum(f[name] for f in figures.values()) / len(figures) for name in names}
    return Evaluation(figures, mean, samples)


def evaluation_table(evaluations: Mapping[str, Evaluation | dict[str, Any]]) -> Table:
    """Mean figures of several evaluations (or their `to_dict()`), a line each."""
    means = {
        name: e.mean if isinstance(e, Evaluation) else e["mean"] for name, e in evaluations.items()
    }
    return _table("model", means)


def language_table(evaluation: Evaluation) -> Table:
    """Figures of one evaluation, a line for each language."""
    several = len(evaluation.languages) > 1
    return _table("language", evaluation.languages | ({"mean": evaluation.mean} if several else {}))


def _table(first: str, lines: Mapping[str, Mapping[str, float | None]]) -> Table:
    table = Table(first, *(Column(title, justify="right") for title in TITLES))
    for name, values in lines.items():
        table.add_row(name, *(_spelt(values.get(k), FIGURES[k]) for k in FIGURES))
    return table


def _spelt(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
