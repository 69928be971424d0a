"""`dudi ablate`: what is not done is done, in the order of seeds, and the report is written.

Shared parts come first, then trials of learning rates, then cells. What is done is kept by the hash
of its configuration; what fails is named, and the others go on. A killed run loses the cells that
were running.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dudi.ablation.cell import Job, done_result, run_cell
from dudi.ablation.grid import (
    START,
    Cell,
    Grid,
    Measured,
    cells_of,
    hash_of,
    read_grid,
    resolved,
    selected,
)
from dudi.ablation.methods import SAME_TEXT
from dudi.ablation.own import check_there, existing
from dudi.ablation.report import write_ablation_report
from dudi.ablation.shared import (
    Part,
    absent_teacher,
    items_part,
    map_part,
    responses_part,
    teacher_part,
    warm_part,
)
from dudi.ablation.tuning import Sweep, measured_of, sweeps_of, trials_of, trials_to_come
from dudi.ablation.workers import run_tasks
from dudi.callbacks import write_text
from dudi.run import quiet_libraries

ERRORS = "errors"  # a folder with a traceback for each cell that failed
OVERHEAD = 25.0  # CPU seconds that a cell takes beside its steps: reading, tokenizing, testing
SMOLLM2_COST = 2.5  # seconds a step of eight rows for its teacher


class CellsFailed(RuntimeError):
    """Some did; the message names them."""


def run_ablation(
    config: str | Path,
    output_dir: str | Path = "runs/ablation",
    *,
    workers: int = 1,
    only: str | None = None,
    dry_run: bool = False,
    report: bool = False,
    docs: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Run a grid, or what `only` selects of it, and write its report; returns the folder.

    `report` writes it from what is done; `docs` is a Markdown file whose tables are replaced too.
    Raises CellsFailed, once all the others are done, where a cell failed.
    """
    console, folder = console or Console(), Path(output_dir)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    grid = read_grid(config)
    run = Run(grid, folder, workers, console)
    wanted = run.possible(selected(cells_of(grid), only))
    if dry_run:
        run.list_cells(wanted)
        return folder
    if not report:
        quiet_libraries()
        tasks = {name: domain.of_task(name) for name, domain in grid.domains.items()}
        trained = {cell.method for cell in wanted} - {START}
        reading = {m for m in trained if grid.method(m).options.get("context_verbalizer")}
        check_there(grid.students, grid.teachers, grid.data, tasks, reading)
        folder.mkdir(parents=True, exist_ok=True)
        run.everything(wanted)
    done = run.done(cells_of(grid))
    if done or not run.failed:
        pages = write_ablation_report(grid, folder, done, run.measured(), docs)
        console.print(f"[bold]ablate[/] {pages[0]}", soft_wrap=True)
    if run.failed:
        raise CellsFailed(
            f"{len(run.failed)} failed: {', '.join(sorted(run.failed))}; tracebacks are in "
            f"{folder / ERRORS}. The same command tries them again."
        )
    return folder


class Run:
    """A grid, its folder, and what has failed."""

    def __init__(self, grid: Grid, folder: Path, workers: int, console: Console) -> None:
        self.grid, self.folder, self.workers, self.console = grid, folder, workers, console
        self.failed: dict[str, str] = {}

    def possible(self, cells: list[Cell]) -> list[Cell]:
        """Those whose teacher is here; the others are told, with the reason."""
        absent = {n: absent_teacher(s.teacher) for n, s in self.grid.settings.items()}
        for name in sorted({c.setting for c in cells if absent[c.setting]}):
            self.console.print(f"[bold]skipped[/] {name}: {absent[name]}", soft_wrap=True)
        return [c for c in cells if not absent[c.setting]]

    # ---- what is there -------------------------------------------------------------------------

    def sweeps(self, wanted: Sequence[Cell]) -> dict[str, Sweep]:
        return sweeps_of(self.grid, wanted, lambda trial: done_result(self.job(trial, {})))

    def measured(self) -> dict[str, Measured]:
        """Of the methods whose trials are all done."""
        return measured_of(self.sweeps(cells_of(self.grid)))

    def job(self, cell: Cell, measured: dict[str, Measured]) -> Job:
        content = resolved(self.grid, cell, measured)
        one_epoch = cell.method != START and self.grid.method(cell.method).one_epoch
        return Job(self.folder.resolve(), cell.name, content, hash_of(content), one_epoch)

    def jobs(self, cells: Sequence[Cell], measured: dict[str, Measured]) -> dict[Cell, Job]:
        """Of the cells whose learning rate and steps are known."""
        found = {}
        for cell in cells:
            try:
                found[cell] = self.job(cell, measured)
            except KeyError:  # its trials failed, or are to come
                continue
        return found

    def done(self, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
        jobs = self.jobs(cells, self.measured())
        results = {cell: done_result(job) for cell, job in jobs.items()}
        return {cell: result for cell, result in results.items() if result is not None}

    # ---- running -------------------------------------------------------------------------------

    def everything(self, wanted: list[Cell]) -> None:
        while trials := self._trials_left(wanted):
            self._do(trials)
        self._do(wanted)

    def _trials_left(self, wanted: Sequence[Cell]) -> list[Cell]:
        """Each round's results decide which ones the next round tries."""
        trials = trials_to_come(self.grid, self.sweeps(wanted))
        return [cell for cell in trials if cell.name not in self.failed]

    def _do(self, cells: list[Cell]) -> None:
        """What is not done of these, with what it needs."""
        jobs = self.jobs(cells, self.measured())
        unknown = [cell.name for cell in cells if cell not in jobs]
        self.failed |= dict.fromkeys(unknown, "its trials failed")
        left = [job for job in jobs.values() if done_result(job) is None]
        for parts in parts_of(self.folder.resolve(), left):
            named = {part.path.name: part for part in parts if not part.path.exists()}
            self._run("make", list(named.items()), _make)
        self._run("cell", [(job.name, job) for job in left], _train)

    def _run(self, what: str, tasks: list[tuple[str, Any]], work: Callable[[Any], None]) -> None:
        began = time.monotonic()
        for i, outcome in enumerate(run_tasks(tasks, work, self.workers), 1):
            name = outcome.task[0]
            file = self.folder / ERRORS / f"{name}.txt"
            file.unlink(missing_ok=True)
            if outcome.error is not None:
                self.failed[name] = outcome.error
                write_text(file, outcome.details or outcome.error)
            told = "" if outcome.error is None else f"[red]failed[/]: {outcome.error}  "
            spent = time.monotonic() - began
            self.console.print(
                f"[bold]{what}[/] {i}/{len(tasks)}  {name}  {told}"
                f"[dim]{spent:.0f} s, {spent / i * (len(tasks) - i):.0f} s left[/]",
                highlight=False,
                soft_wrap=True,
            )

    # ---- telling -------------------------------------------------------------------------------

    def list_cells(self, wanted: list[Cell]) -> None:
        """All cells and trials: what is done, and about how long the others take."""
        measured = self.measured()
        cells = [*trials_of(self.grid, self.sweeps(wanted)), *wanted]
        done = self.done(cells) if measured or not self.grid.tune else {}
        done |= {c: {} for c in cells if c.trial is not None and done_result(self.job(c, {}))}
        table = Table("cell", "about", "state")
        left: list[float | None] = []
        for cell in cells:
            seconds = self._estimate(cell, measured)
            if cell not in done:
                left.append(seconds)
            about = "?" if seconds is None else f"{seconds:.0f} s"
            table.add_row(cell.name, about, "done" if cell in done else "to do")
        self.console.print(table)
        self.console.print(
            f"{len(cells)} cells, {len(done)} done; {self._told(left)}", soft_wrap=True
        )

    def _told(self, left: list[float | None]) -> str:
        """How long the cells that are left take."""
        if None in left:
            return "how long the others take with these models is known once the trials are done"
        minutes = sum(seconds or 0.0 for seconds in left) / self.workers / 60
        return (
            f"the others take about {minutes:.0f} minutes with {self.workers} free cores (and "
            "shared parts a few minutes)"
        )

    def _estimate(self, cell: Cell, measured: Mapping[str, Measured]) -> float | None:
        """Seconds of a cell; None where they are those of the user's own models, and unmeasured."""
        setting = self.grid.settings[cell.setting]
        own = existing(self.grid.students[setting.student]) or setting.teacher in self.grid.teachers
        if cell.method == START:
            return None if own else OVERHEAD
        name = setting.seconds_of or cell.method
        steps = (self.grid.settings[setting.like] if setting.like else setting).steps
        tried = measured.get(self.grid.rate_of(name))
        if own and tried is None:
            return None
        cost = tried.seconds_a_step if tried is not None else self.grid.method(name).cost
        teacher = SMOLLM2_COST if setting.teacher == "smollm2" else 0.0
        slower = teacher if self.grid.method(name).needs_teacher else 0.0
        return OVERHEAD + float(steps or 0) * (cost + slower)


def parts_of(folder: Path, jobs: Sequence[Job]) -> list[list[Part]]:
    """What these cells share, in two rounds: the second needs the first."""
    cells = [job.cell for job in jobs]
    first: list[Part] = []
    second: list[Part] = []
    for cell in cells:
        first += [items_part(folder, split, cell["languages"]) for split in ("validation", "test")]
        if existing(cell["student"]) is None:
            first.append(warm_part(folder, cell))
        if cell["teacher"] == "smollm2":
            first.append(teacher_part(folder))
        if cell["data"] == "teacher":
            second.append(responses_part(folder, cell))
        if cell["options"].get("vocabulary_verbalizer") == SAME_TEXT:
            second.append(map_part(folder, cell))
    return [first, second]


def _make(task: tuple[str, Part]) -> None:
    quiet_libraries()
    task[1]()


def _train(task: tuple[str, Job]) -> None:
    run_cell(task[1])
