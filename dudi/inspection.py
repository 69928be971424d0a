"""`dudi verbalize`: what the student will learn from, row by row, for a person to look at.

For a few rows of each language: the prompt that the teacher reads, as text and ids; the reference
response in both tokens, and which rows pair; what the verbalized teacher says beside the plain one;
and what reaches the student after refinement and the map between the vocabularies. Dense, from the
models' own logits: it shares nothing with the fused losses that it shows the input of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dudi.callbacks import write_text
from dudi.config import DuDiConfig, ScriptArguments
from dudi.data import load_data
from dudi.rollout import inference_mode_of
from dudi.run import build_trainer, quiet_libraries
from dudi.teaching import confidence
from dudi.trainer import DuDiTrainer

REST = "(the rest)"  # mass without a token of the student's
Says = list[tuple[str, float]]  # likeliest tokens and their probabilities


class TokenRow(NamedTuple):
    """One row of the response: what comes after the tokens before."""

    token: str  # the student's
    partner: str | None  # the teacher's token at the same byte; None: the row has no partner
    plain: Says  # under the student's prompt
    verbalized: Says  # under the verbalizer's
    learnt: Says  # refined, in the student's tokens
    divergence: float | None  # KL(verbalized || plain), nats
    weight: float  # of the row's divergence: 0 where it is left out


@dataclass
class Shown:
    """One row of the data."""

    language: str
    row: int
    prompt: str  # the student's
    teacher_prompt: str
    teacher_prompt_ids: list[int]
    response: str
    tokens: list[TokenRow]

    @property
    def paired(self) -> float:
        return sum(t.partner is not None for t in self.tokens) / max(len(self.tokens), 1)

    @property
    def divergence(self) -> float:
        """Mean KL(verbalized || plain) over the rows that pair."""
        found = [t.divergence for t in self.tokens if t.divergence is not None]
        return sum(found) / len(found) if found else math.nan


class _Heard(NamedTuple):
    """What the teacher says in the rows of one response, both ways: log-probabilities."""

    verbalized: Tensor  # (R, U)
    plain: Tensor  # (R, U)


def choose_rows(dataset: Any, count: int) -> list[int]:
    """The first rows of each language, in the order of the data."""
    if "language" not in dataset.column_names:
        return list(range(min(count, len(dataset))))
    taken: Counter[str] = Counter()
    chosen = []
    for i, language in enumerate(dataset.with_format(None)["language"][:]):
        taken[language] += 1
        if taken[language] <= count:
            chosen.append(i)
    return chosen


def inspect_rows(trainer: DuDiTrainer, top: int = 5) -> list[Shown]:
    """Every row of a trainer's training data; `top` tokens of each distribution."""
    if trainer.teacher is None:
        raise ValueError("there must be a teacher to look at: no signal of this recipe needs one")
    with inference_mode_of(trainer.model), inference_mode_of(trainer.teacher):
        return [_shown(trainer, row, top) for row in trainer.train_dataset]


def _shown(trainer: DuDiTrainer, row: dict[str, Any], top: int) -> Shown:
    own, other = trainer.processing_class, trainer.bridge.tokenizer
    seen = _teacher_prompt(trainer, row)
    ids = row["completion_ids"]
    texts, pairs = ids, {i: i for i in range(len(ids))}
    if trainer.bridge.pairing is not None:
        found = trainer.bridge.pairing([ids])
        texts, rows = found.teacher_ids[0], (found.student_rows[0], found.teacher_rows[0])
        pairs = dict(zip(*(r.tolist() for r in rows), strict=True))
    heard = _Heard(
        *(_log_probs(trainer.teacher, prompt, texts) for prompt in (seen, row["plain_prompt_ids"]))
    )
    learnt = _learnt(trainer, heard)
    tokens = [
        _token_row(trainer, i, pairs.get(i), ids, texts, heard, learnt, top)
        for i in range(len(ids))
    ]
    return Shown(
        row["language"],
        row["row"],
        own.decode(row["prompt_ids"]),
        other.decode(seen),
        seen,
        own.decode(ids),
        tokens,
    )


def _teacher_prompt(trainer: DuDiTrainer, row: dict[str, Any]) -> list[int]:
    """With a greedy sample where the template shows one."""
    verbalizer = trainer.verbalizer
    if verbalizer is None or not verbalizer.reads_samples:
        return list(row["teacher_prompt_ids"])
    rollout = trainer.greedy_sample(torch.tensor(row["prompt_ids"]))
    return trainer.teaching.prompts_with([row["row"]], rollout)[0].tolist()


@torch.no_grad()
def _log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """(R, U) float64, of the rows that predict the response."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *response]], device=device)
    rows = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    return model(ids, use_cache=False).logits[0, rows].double().log_softmax(-1).cpu()


def _learnt(trainer: DuDiTrainer, heard: _Heard) -> Tensor:
    """(R, V), or (R, V + 1) with what has no token of the student's: refined and mapped."""
    a, share = trainer.args, trainer.args.verbalized_share
    logits = share * heard.verbalized + (1 - share) * heard.plain if share < 1 else heard.verbalized
    p = (logits / (a.teacher_temperature or a.temperature)).softmax(-1)
    if a.teacher_top_p < 1:
        p = _nucleus(p, a.teacher_top_p)
    v = trainer.bridge.verbalizer
    if v is None:
        return p
    mass = v.to("cpu").project(p)
    if v.unmatched == "bucket":
        return torch.cat([mass, (1 - mass.sum(-1, keepdim=True)).clamp(min=0)], -1)
    return mass / mass.sum(-1, keepdim=True)


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens of this mass, those that tie with the last one included."""
    ordered = p.sort(-1, descending=True).values
    count = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)
    kept = torch.where(p >= ordered.gather(-1, count - 1), p, 0)
    return kept / kept.sum(-1, keepdim=True)


def _token_row(
    trainer: DuDiTrainer,
    i: int,
    partner: int | None,
    ids: Sequence[int],
    texts: Sequence[int],
    heard: _Heard,
    learnt: Tensor,
    top: int,
) -> TokenRow:
    own, other, a = trainer.processing_class, trainer.bridge.tokenizer, trainer.args
    token = spelt(own, ids[i])
    if partner is None:
        return TokenRow(token, None, [], [], [], None, 0.0)
    verbalized, plain = heard.verbalized[partner], heard.plain[partner]
    weight = float(i >= a.teacher_skip_tokens)
    if a.confidence_gating and partner < len(texts):
        target = texts[partner]
        weight *= float(confidence(verbalized[target], plain[target], a.confidence_gating))
    gap = torch.where(verbalized.isinf(), 0, verbalized.exp() * (verbalized - plain))
    return TokenRow(
        token,
        spelt(other, texts[partner]),
        _top(plain.exp(), other, top),
        _top(verbalized.exp(), other, top),
        _top(learnt[partner], own, top),
        float(gap.sum()),
        weight,
    )


def _top(p: Tensor, tokenizer: Any, count: int) -> Says:
    found = p.topk(min(count, len(p)))
    return [
        (spelt(tokenizer, int(i)), float(value))
        for value, i in zip(found.values, found.indices, strict=True)
        if value > 0
    ]


def spelt(tokenizer: Any, i: int) -> str:
    """A token as text; what is no text by itself as its piece or number."""
    if i >= len(tokenizer):
        return REST
    text = tokenizer.decode([i])
    if not text or "\ufffd" in text:
        text = str(tokenizer.convert_ids_to_tokens(i) or i)
    return text.replace("\n", "⏎").replace("\t", "⇥")


# ---- as a terminal shows it ----------------------------------------------------------------------


def terminal(shown: Shown, most_tokens: int) -> Panel:
    table = Table("student", "teacher", "plain", "verbalized", "learnt", "KL", "weight", box=None)
    for t in shown.tokens[:most_tokens]:
        table.add_row(
            Text(repr(t.token)[1:-1] if t.token.isspace() else t.token, style="bold"),
            Text("–" if t.partner is None else t.partner),
            *(Text(said(part[:3])) for part in (t.plain, t.verbalized, t.learnt)),
            "" if t.divergence is None else f"{t.divergence:.3f}",
            f"{t.weight:.2f}",
        )
    more = len(shown.tokens) - most_tokens
    ids = shown.teacher_prompt_ids
    title = (
        f"{shown.language or 'row'} · row {shown.row} · {shown.paired:.0%} of the rows pair · "
        f"KL(verbalized, plain) {shown.divergence:.3f} nats a token"
    )
    texts = Group(
        Text.assemble(("the student reads  ", "dim"), shown.prompt),
        Text.assemble(("the teacher reads  ", "dim"), shown.teacher_prompt),
        Text.assemble(("as ids  ", "dim"), f"{' '.join(map(str, ids[:24]))} ... ({len(ids)})"),
        Text.assemble(("the response  ", "dim"), shown.response),
        table,
        Text(f"... {more} tokens more" if more > 0 else "", style="dim"),
    )
    return Panel(texts, title=title, title_align="left")


def said(says: Says) -> str:
    return "  ".join(f"{token} {p:.2f}" for token, p in says)


def summary(rows: Sequence[Shown]) -> Table:
    """A line a language."""
    table = Table("language", "rows", "rows that pair", "KL(verbalized, plain)", "mean weight")
    for language in dict.fromkeys(s.language for s in rows):
        own = [s for s in rows if s.language == language]
        tokens = [t for s in own for t in s.tokens]
        gaps = [t.divergence for t in tokens if t.divergence is not None]
        table.add_row(
            language or "–",
            str(len(own)),
            f"{sum(t.partner is not None for t in tokens) / max(len(tokens), 1):.0%}",
            f"{sum(gaps) / len(gaps):.3f}" if gaps else "–",
            f"{sum(t.weight for t in tokens) / max(len(tokens), 1):.2f}",
        )
    return table


# ---- the page and the command --------------------------------------------------------------------


def render(rows: Sequence[Shown], about: dict[str, Any]) -> str:
    """One self-contained HTML page."""
    environment = Environment(
        loader=PackageLoader("dudi", "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("verbalize.html.j2").render(rows=rows, **about)


def run_inspection(
    script: ScriptArguments,
    config: DuDiConfig,
    *,
    rows: int = 2,
    top: int = 5,
    tokens: int = 12,
    page: str | Path = "verbalize.html",
    console: Console | None = None,
) -> Path:
    """`dudi verbalize`: print a few rows of each language, write them all to an HTML page."""
    console = console or Console()
    for name, value in (("rows", rows), ("top", top), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    path = Path(page)
    if path.is_dir():
        raise ValueError(f"page must be a file, got the folder {str(page)!r}")
    quiet_libraries()
    data = load_data(
        str(script.dataset_name), name=script.dataset_config, split=script.dataset_train_split
    )
    few = data.select(choose_rows(data, rows))
    trainer = build_trainer(script, config, train=few)
    shown = inspect_rows(trainer, top)
    for s in shown:
        console.print(terminal(s, tokens))
    console.print(summary(shown))
    v = trainer.bridge.verbalizer
    about = {
        "student": script.model_name_or_path or "a new student",
        "teacher": config.teacher_model_name_or_path,
        "vocabulary": None if v is None else repr(v),
        "refinement": _refinement(config),
    }
    write_text(path, render(shown, about))
    console.print(f"Page: {path}")
    return path


def _refinement(config: DuDiConfig) -> dict[str, Any]:
    """What differs from the teacher as it is."""
    names = (
        "teacher_temperature", "teacher_top_p", "verbalized_share", "confidence_gating",
        "teacher_skip_tokens",
    )  # fmt: skip
    plain = {"teacher_temperature": None, "teacher_skip_tokens": 0, "confidence_gating": 0.0}
    return {n: v for n in names if (v := getattr(config, n)) != plain.get(n, 1.0)}
