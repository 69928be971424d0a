"""The grid's report from what is done: report.md, report.html, report.json, a document's tables.

For each setting: means over seeds with intervals, differences to DuDi and to SFT that are paired by
seed and row, differences by language, and the validation curve at equal seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dudi.ablation.grid import START, Cell, Grid, Measured, applies, cells_of
from dudi.ablation.results import Results, Table, tables
from dudi.callbacks import write_text
from dudi.page import page
from dudi.report_figures import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, LineChart, line_chart

BEGIN, END = "<!-- tables: dudi ablate --report -->", "<!-- end of tables -->"
FIRST = ("sft", "forward_kl", "gkd", "distillm", "dudi")
COLOURS = 5  # curves; more could not be told apart


def write_ablation_report(
    grid: Grid,
    folder: Path,
    done: Mapping[Cell, dict[str, Any]],
    measured: Mapping[str, Measured],
    docs: str | Path | None = None,
) -> list[Path]:
    """Raises ValueError where nothing is done, or `docs` has no place for the tables."""
    if not done:
        raise ValueError(f"there is no result of this grid in {folder}: run it first")
    page = None if docs is None else _read_docs(Path(docs))
    results = Results(grid, done)
    found = tables(results, measured)
    text = markdown(grid, done, found)
    paths = [folder / f"report.{kind}" for kind in ("html", "md", "json")]
    runs = [results.title(name) for name in drawn(results)]
    write_text(paths[0], html(found, charts(results), runs, missing(grid, done)))
    write_text(paths[1], text)
    write_text(paths[2], json.dumps(as_json(results, measured), indent=1, ensure_ascii=False))
    if docs is not None and page is not None:
        before, after = page
        write_text(Path(docs), f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    return paths


def _read_docs(path: Path) -> tuple[str, str]:
    """What stands before and after the tables."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs {str(path)!r} must have the lines {BEGIN} and {END}")
    return before, after


def missing(grid: Grid, done: Mapping[Cell, Any]) -> str:
    """What a reader of an unfinished grid must know."""
    cells = [c for c in cells_of(grid) if c.method == START or applies_to(grid, c)]
    left = [cell.name for cell in cells if cell not in done]
    if not left:
        return f"All {len(cells)} cells are done."
    shown = ", ".join(left[:8]) + (", ..." if len(left) > 8 else "")
    return f"{len(done)} of {len(cells)} cells are done; not: {shown}."


def applies_to(grid: Grid, cell: Cell) -> bool:
    return applies(grid, cell.method, grid.settings[cell.setting])


def markdown(grid: Grid, done: Mapping[Cell, Any], found: Sequence[Table]) -> str:
    parts = [missing(grid, done)]
    level = ""
    for table in found:
        if table.setting != level:
            parts.append(f"## {table.setting}")
            level = table.setting
        parts.append(f"### {table.title}\n\n{table.note}\n\n{_markdown_table(table)}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---"] + ["---:"] * (len(table.head) - 1)
    lines = [table.head, rule, *([cell.replace("|", "\\|") for cell in row] for row in table.lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- curves --------------------------------------------------------------------------------------


def drawn(results: Results) -> list[str]:
    """The methods that have a curve, each of one colour in all charts."""
    used = {cell.method for cell in results.done} - {START}
    wanted = [*FIRST, *results.grid.methods, *results.grid.known]
    return [m for m in dict.fromkeys(wanted) if m in used][:COLOURS]


def charts(results: Results) -> list[LineChart]:
    """Validation NLL over seconds, of the mean over seeds."""
    found = []
    for name, setting in results.grid.settings.items():
        curves = {
            results.title(m): results.curve(name, m)
            for m in drawn(results)
            if len(results.curve(name, m)[0]) > 1
        }
        if curves:
            note = f"validation, nats a character, over {results.seconds} of training"
            found.append(line_chart(setting.title, note, curves))
    return found


def html(
    found: Sequence[Table], curves: Sequence[LineChart], runs: Sequence[str], state: str
) -> str:
    """`runs`: titles of all methods with a curve, in the order of colours."""
    size = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM}
    return page(
        "ablation.html.j2", {}, tables=found, charts=curves, runs=runs, state=state, size=size
    )


def as_json(results: Results, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """All estimates, and the values of each seed."""
    return {
        "learning_rates": {name: own._asdict() for name, own in measured.items()},
        "settings": {name: results.numbers(name) for name in results.grid.settings},
        "environments": results.environments(),
    }
