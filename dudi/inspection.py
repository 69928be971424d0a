"""`dudi verbalize`: what the student will learn from, for a person to look at.

A few rows of each language (inspection_figures.py) as panels and a summary in the terminal, and
with all of their tokens as one self-contained HTML page.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text
from transformers.trainer_utils import IntervalStrategy

from dudi.callbacks import write_text
from dudi.config import DuDiConfig, ScriptArguments
from dudi.data import load_data
from dudi.inspection_figures import Says, Shown, choose_rows, inspect_rows
from dudi.page import page
from dudi.run import build_trainer, quiet_libraries

LEAST = 0.005  # of a probability that is told: less reads 0.00
IDS = 24  # of a prompt that the terminal shows


class Summary(NamedTuple):
    """Of one language."""

    language: str
    rows: int
    paired: str  # share of the student's rows
    divergence: str  # KL(verbalized || plain), nats a token
    weight: str  # mean over all rows


def summarise(rows: Sequence[Shown]) -> list[Summary]:
    """A line for each language, in the order of the data."""
    lines = []
    for language in dict.fromkeys(s.language for s in rows):
        own = [s for s in rows if s.language == language]
        tokens = [t for s in own for t in s.tokens]
        gaps = [t.divergence for t in tokens if t.divergence is not None]
        lines.append(
            Summary(
                language or "–",
                len(own),
                f"{sum(t.partner is not None for t in tokens) / len(tokens):.0%}",
                f"{sum(gaps) / len(gaps):.3f}" if gaps else "–",
                f"{sum(t.weight for t in tokens) / len(tokens):.2f}",
            )
        )
    return lines


# ---- the terminal --------------------------------------------------------------------------------


def panel(shown: Shown, most_tokens: int) -> Panel:
    """One row of data: what is read, and a table of the first tokens."""
    ids = shown.teacher_prompt_ids
    texts = (
        ("the student reads", shown.prompt),
        ("the teacher reads", shown.teacher_prompt),
        ("as ids", f"{' '.join(map(str, ids[:IDS]))}{' ...' * (len(ids) > IDS)} ({len(ids)})"),
        ("the response", shown.response),
    )
    lines = [Text.assemble((f"{what}  ", "dim"), text) for what, text in texts]
    title = f"{shown.language or 'row'} · row {shown.row} · {shown.paired:.0%} pair"
    if shown.divergence is not None:
        title += f" · KL {shown.divergence:.3f}"
    more = len(shown.tokens) - most_tokens
    rest = [Text(f"... {more} tokens more", style="dim")] if more > 0 else []
    return Panel(
        Group(*lines, _token_table(shown, most_tokens), *rest), title=title, title_align="left"
    )


def _token_table(shown: Shown, most: int) -> Table:
    names = ("student", "teacher", "plain", "verbalized", "learnt")
    wide = [Column(name, no_wrap=True, ratio=2 if i > 1 else 1) for i, name in enumerate(names)]
    table = Table(*wide, Column("KL", width=6), Column("weight", width=6), box=None, expand=True)
    for t in shown.tokens[:most]:
        table.add_row(
            Text(t.token, style="bold"),
            Text("–" if t.partner is None else t.partner),
            *(Text(said(part)) for part in (t.plain, t.verbalized, t.learnt)),
            "" if t.divergence is None else f"{t.divergence:.3f}",
            f"{t.weight:.2f}",
        )
    return table


def told(says: Says) -> Says:
    return [one for i, one in enumerate(says) if i == 0 or one[1] >= LEAST]


def said(says: Says) -> str:
    return "\n".join(f"{p:.2f} {token}" for token, p in told(says)[:3])


def summary_table(lines: Sequence[Summary]) -> Table:
    table = Table(
        "language",
        *(Column(n, justify="right") for n in ("rows", "pair", "KL(verbalized, plain)", "weight")),
    )
    for line in lines:
        table.add_row(*map(str, line))
    return table


# ---- the page ------------------------------------------------------------------------------------


def render(rows: Sequence[Shown], about: dict[str, Any]) -> str:
    """One self-contained HTML page; `about`: student, teacher, vocabulary, refinement."""
    return page("verbalize.html.j2", {}, rows=rows, summary=summarise(rows), told=told, **about)


def refinement(config: DuDiConfig) -> dict[str, Any]:
    """What differs from the teacher as it is."""
    off = {
        "teacher_temperature": None,
        "teacher_top_p": 1.0,
        "verbalized_share": 1.0,
        "confidence_gating": 0.0,
        "teacher_skip_tokens": 0,
    }
    return {n: value for n, plain in off.items() if (value := getattr(config, n)) != plain}


# ---- the command ---------------------------------------------------------------------------------


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
    """`dudi verbalize`: print a few rows of each language, write them all to an HTML page.

    rows: of each language. top: likeliest tokens of a distribution. tokens: of a response, in the
    terminal. `page` is written whole or not at all, and nothing else is: not the run's folder.
    """
    console = console or Console()
    for name, value in (("rows", rows), ("top", top), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    path = Path(page)
    if path.is_dir():
        raise ValueError(f"page must be a file, got the folder {str(page)!r}")
    if not config.needs_teacher:
        raise ValueError("there must be a teacher to look at: no signal of this recipe needs one")
    for name in ("teacher_cache", "teacher_url"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} must be left out: a live teacher is needed to look at")
    quiet_libraries()
    data = load_data(
        str(script.dataset_name), name=script.dataset_config, split=script.dataset_train_split
    )
    shown, vocabulary = _inspected(script, config, data.select(choose_rows(data, rows)), top)
    for s in shown:
        console.print(panel(s, tokens))
    console.print(summary_table(summarise(shown)))
    about = {
        "student": script.model_name_or_path or "a new student",
        "teacher": config.teacher_model_name_or_path,
        "vocabulary": vocabulary,
        "refinement": refinement(config),
    }
    write_text(path, render(shown, about))
    console.print(f"Page: {path}", soft_wrap=True)
    return path


def _inspected(
    script: ScriptArguments, config: DuDiConfig, data: Any, top: int
) -> tuple[list[Shown], str | None]:
    """What there is to see of these rows, and the map between the vocabularies in words."""
    config.eval_strategy = IntervalStrategy.NO
    config.max_unpaired = 1.0  # of so few rows: to be seen, not refused
    with tempfile.TemporaryDirectory() as scratch:
        config.output_dir = scratch  # the Trainer makes it
        trainer = build_trainer(script, config, train=data)
        v = trainer.bridge.verbalizer
        return inspect_rows(trainer, top), None if v is None else repr(v)
