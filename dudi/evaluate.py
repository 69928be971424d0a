"""Held-out figures for each language: likelihood, divergence from the teacher, translation quality.

Negative log-likelihood and KL come from the fused kernels over the reference's tokens (its eos
included), both models under the student's own prompt; no logits exist. A teacher with another
tokenizer reads prompt and reference in its own tokens; KL is then over the rows that both have.
chrF (sacrebleu) compares greedy generations with the references. Sums are kept by language; a mean
over languages gives each the same weight. Rows are batched by length: batch_size changes speed, not
figures.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.table import Column, Table
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from dudi.bridge import Bridge, MapSettings, build_bridge
from dudi.callbacks import write_text
from dudi.data import COLUMNS, holds_one_split, load_data, prepare_dataset
from dudi.known import KnownTop
from dudi.models import load_model, load_tokenizer
from dudi.rollout import generate, inference_mode_of
from dudi.sharding import run_inside
from dudi.signals import lm_head, pack, response_hidden, vocab_size
from dudi.teaching import Responses, make_lesson, teach
from dudi_kernels import linear_distill_loss, linear_log_prob

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


def _batches(dataset: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of like length together."""
    rows = sorted(dataset, key=lambda r: len(r["prompt_ids"]) + len(r["completion_ids"]))
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _tensors(rows: list[dict[str, Any]], name: str) -> list[Tensor]:
    return [torch.tensor(row[name], dtype=torch.long) for row in rows]


def _row_scores(
    model: Any,
    teacher: Any,
    bridge: Bridge,
    rows: list[dict[str, Any]],
    pad: int,
    padding_free: bool,
) -> Tensor:
    """(B, 3) summed NLL and KL of each row's reference, and over how many tokens the KL is."""

    def scores() -> Tensor:
        return _scores_inside(model, teacher, bridge, rows, pad, padding_free)

    if teacher is None or teacher is model:
        return run_inside(model, scores)
    return run_inside(model, lambda: run_inside(teacher, scores))


def _scores_inside(
    model: Any,
    teacher: Any,
    bridge: Bridge,
    rows: list[dict[str, Any]],
    pad: int,
    padding_free: bool,
) -> Tensor:
    device = next(model.parameters()).device
    texts = _tensors(rows, "completion_ids")
    packed = pack(_tensors(rows, "prompt_ids"), texts, pad).to(device)
    hidden, head = response_hidden(model, packed, padding_free), lm_head(model)
    taught = torch.ones(len(hidden), device=device)
    if teacher is None or teacher is model:
        nll = -linear_log_prob(hidden, head, packed.targets)
        kl = torch.full_like(nll, 0.0 if teacher is model else math.nan)
    else:
        responses = Responses(texts, list(range(len(rows))), [2 * i for i in range(len(rows))])
        seen = _tensors(rows, "plain_prompt_ids")
        lesson = make_lesson(responses, (0,), seen, None, bridge.pairing, pad)
        guide = teach(teacher, lesson, len(hidden), device, padding_free=padding_free)
        values = linear_distill_loss(
            hidden,
            head,
            *guide.side,
            targets=packed.targets,
            verbalizer=bridge.verbalizer,
        )
        taught = taught if guide.weight is None else guide.weight
        nll, kl = -values.log_prob, torch.where(taught > 0, values.divergence, 0)
    sums = torch.zeros(len(rows), 3, dtype=torch.float64, device=device)
    sums.index_add_(0, packed.segment_ids, torch.stack([nll, kl, taught], 1).double())
    return sums.cpu()


def _chars(tokenizer: Any, row: dict[str, Any]) -> int:
    """Characters that the scored tokens spell: all, unless the reference was truncated."""
    if row["completion_ids"][-1] == tokenizer.eos_token_id:
        return len(row["completion_text"])
    return len(tokenizer.decode(row["completion_ids"], skip_special_tokens=True))


def _likelihoods(
    model: Any,
    teacher: Any,
    bridge: Bridge,
    tokenizer: Any,
    dataset: list[dict[str, Any]],
    batch_size: int,
    padding_free: bool,
    tell: Callable[[int], None],
) -> dict[str, dict[str, float]]:
    """Figures by language; chrF is still unknown."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for rows in _batches(dataset, batch_size):
        pad = _pad(tokenizer)
        scores = _row_scores(model, teacher, bridge, rows, pad, padding_free).tolist()
        for row, (nll, kl, taught) in zip(rows, scores, strict=True):
            own = totals[row["language"] or ALL]
            own["rows"] += 1
            own["tokens"] += len(row["completion_ids"])
            own["chars"] += _chars(tokenizer, row)
            own["nll"] += nll
            own["kl"] += kl
            own["taught"] += taught
        tell(len(rows))
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
    for batch in _batches(rows, batch_size):
        rollout = generate(
            model,
            _tensors(batch, "prompt_ids"),
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
        tell(len(batch))
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
    size = _vocab_size(model)
    largest = max(max(row["prompt_ids"] + row["completion_ids"]) for row in rows)
    if largest >= size:
        raise ValueError(
            f"dataset must hold ids of the model's vocabulary of {size}, got {largest}: "
            "its tokenizer belongs to another model"
        )
    mapped = bridge.verbalizer is not None or isinstance(teacher, KnownTop)
    if teacher is not None and not mapped and _vocab_size(teacher) != size:
        raise ValueError(
            f"teacher must share the model's vocabulary of {size}, got {_vocab_size(teacher)}"
        )


def _vocab_size(model: Any) -> int:
    return run_inside(model, lambda: vocab_size(model))


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
    padding_free: bool = False,
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
        padding_free: bodies read rows one after another, as in training (`response_hidden`).
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
        figures = _likelihoods(
            model, teacher, bridge, tokenizer, rows, batch_size, padding_free, tell
        )
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


def run_evaluation(
    model_name_or_path: str,
    dataset_name: str,
    *,
    teacher_model_name_or_path: str | None = None,
    teacher_tokenizer_name_or_path: str | None = None,
    vocabulary_verbalizer: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    tokenizer_name_or_path: str | None = None,
    batch_size: int = 16,
    max_prompt_length: int | None = 512,
    max_completion_length: int = 256,
    generate_rows: int | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """`dudi evaluate`: load, evaluate, print a table by language.

    `output` is a JSON file, written whole or not at all, that `dudi report` can read.
    """
    console = console or Console()
    if output is not None and Path(output).is_dir():
        raise ValueError(f"output must be a file, got the folder {str(output)!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    tokenizer = (
        load_tokenizer(tokenizer_name_or_path, "tokenizer_name_or_path")
        if tokenizer_name_or_path
        else load_tokenizer(model_name_or_path, "model_name_or_path")
    )
    split = split or ("train" if holds_one_split(dataset_name) else "test")
    data = load_data(dataset_name, name=dataset_config, split=split)
    model = _load(model_name_or_path, "model_name_or_path")
    teacher, bridge = None, Bridge(tokenizer)
    if teacher_model_name_or_path:
        teacher = _load(teacher_model_name_or_path, "teacher_model_name_or_path")
        own = teacher_tokenizer_name_or_path
        bridge = build_bridge(model, teacher, tokenizer, own, MapSettings(vocabulary_verbalizer))
    dataset, _ = prepare_dataset(
        data,
        tokenizer,
        teacher_tokenizer=bridge.tokenizer,
        pairing=bridge.pairing,
        chat_template_kwargs=chat_template_kwargs,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        split_name="evaluation",
    )
    with ProgressBar(console=console, transient=True) as bar:
        task = bar.add_task("evaluate", total=None)
        result = evaluate_model(
            model,
            tokenizer,
            dataset,
            teacher=teacher,
            bridge=bridge,
            batch_size=batch_size,
            generate_rows=generate_rows,
            max_completion_length=max_completion_length,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(language_table(result))
    if output is not None:
        write_text(Path(output), json.dumps({"model": result.to_dict()}, ensure_ascii=False))
    return result


def _load(name: str, argument: str) -> Any:
    """A causal LM where it runs best: as saved on a GPU, in fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    model = load_model(name, {"dtype": "auto" if cuda else torch.float32}, argument)
    return model.to("cuda" if cuda else "cpu")
