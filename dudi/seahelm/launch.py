"""`dudi seahelm run`: SEA-HELM over a prepared folder, once for each seed.

    RESULTS/NAME/run_N/       what SEA-HELM writes: inferences, results, configs, logs
    RESULTS/logs/run_N.log    all that the process printed, under its command line
    RESULTS/seahelm_run.json  what the runs are of: the same command goes on, another is refused

A run has ended when its result file has totals and no task failed. The others are started (again):
SEA-HELM keeps the inferences that it has.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from dudi.callbacks import write_text
from dudi.saving import MANIFEST_FILE
from dudi.seahelm.checkout import Checkout, check_options, check_suite, link, open_checkout
from dudi.seahelm.facts import facts
from dudi.seahelm.prepare import RESULTS, SETTINGS_FILE, SUITE_FILE, Prepared, read_prepared
from dudi.seahelm.results import failed_tasks, newest_finished, read_json

LINKS = "_checkout"
STATE_FILE = "seahelm_run.json"


class SeahelmError(RuntimeError):
    """A run of SEA-HELM failed; the message names its exit status and log."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: int
    seed: int
    code: int | None  # None: it had ended before
    log: Path
    problem: str | None

    def told(self) -> str:
        had = "had ended before" if self.code is None else f"exit status {self.code}"
        bad = f"; {self.problem}, see {self.log}" if self.problem else ""
        return f"run {self.run}, seed {self.seed}: {had}{bad}"


@dataclass(frozen=True)
class Plan:
    """Everything of the runs, before any is started."""

    prepared: Prepared
    suites: str
    checkout: Checkout
    results: Path
    commands: list[list[str]]  # by run
    seeds: list[int]
    state: dict[str, Any]  # what the results are of

    def run_folder(self, run: int) -> Path:
        return self.results / self.prepared.model / f"run_{run}"


def make_plan(
    prepared: str | Path,
    checkout: str | Path,
    *,
    output_dir: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    python: str | None = None,
    limit: int | None = None,
) -> Plan:
    """The command of each run, all that can be wrong with it checked.

    Raises:
        ValueError: a bad option, a folder that is not what it should be, or a checkout without a
            task of the suite or an option of the command.
    """
    chosen = list(facts()["seeds"] if seeds is None else seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be distinct, at least one, got {chosen}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    folder, settings = Path(prepared).absolute(), read_prepared(prepared)
    found = open_checkout(checkout)
    check_suite(found, settings.suite)
    results = Path(output_dir).absolute() if output_dir is not None else folder / RESULTS
    launcher = [python] if python else ["uv", "run", "--project", str(found.path), "python"]
    more = [] if limit is None else ["--limit", str(limit)]
    commands = [
        launcher
        + settings.command(str(folder / settings.model), str(results), str(run), str(seed))
        + more
        for run, seed in enumerate(chosen)
    ]
    check_options(found, commands[0])
    suites = (folder / SUITE_FILE).read_text(encoding="utf-8")
    state = {"prepared": _hash(folder, settings), "limit": limit, "checkout": found.commit}
    plan = Plan(settings, suites, found, results, commands, chosen, state)
    _check_results(plan)
    return plan


# ---- what the results are of ---------------------------------------------------------------------


def _hash(folder: Path, prepared: Prepared) -> str:
    """Of the suite, the settings, and the names and sizes of the model's files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in (SETTINGS_FILE, SUITE_FILE, f"{prepared.model}/{MANIFEST_FILE}"):
        digest.update((folder / path).read_bytes())
    return digest.hexdigest()


def _check_results(plan: Plan) -> None:
    """Refuse to go on with results of another model, suite, version or seed."""
    path = plan.results / STATE_FILE
    if not path.exists():
        return
    before = read_json(path)
    seeds = before.get("seeds", [])
    shared = min(len(seeds), len(plan.seeds))
    if seeds[:shared] != plan.seeds[:shared]:
        raise ValueError(
            f"output_dir {plan.results} has runs of seeds {seeds}, now {plan.seeds}: choose another"
        )
    for name, value in plan.state.items():
        if before.get(name) != value:
            raise ValueError(
                f"output_dir {plan.results} has runs with {name} {before.get(name)}, now {value}: "
                "choose another"
            )


def _remember(plan: Plan) -> None:
    path = plan.results / STATE_FILE
    before = read_json(path)["seeds"] if path.exists() else []
    write_text(path, json.dumps({**plan.state, "seeds": max(before, plan.seeds, key=len)}))


def _problem(plan: Plan, run: int) -> str | None:
    """Why a run has not ended; None: it has."""
    newest = newest_finished(plan.run_folder(run))
    if newest is None:
        return "it wrote no result file with totals"
    failed = failed_tasks(read_json(newest))
    return f"SEA-HELM could not evaluate {', '.join(failed)}" if failed else None


# ---- running -------------------------------------------------------------------------------------


def start(plan: Plan, run: int) -> Outcome:
    """One run, from beginning to end, unless it has ended before."""
    log = plan.results / "logs" / f"run_{run}.log"
    seed = plan.seeds[run]
    if _problem(plan, run) is None:
        return Outcome(run, seed, None, log, None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        file.write(f"# {now}\n# {shlex.join(plan.commands[run])}\n")
        file.flush()
        code = _call(plan.commands[run], plan.results / LINKS, file)
        file.write(f"# exit status {code}\n")
    problem = _problem(plan, run)
    return Outcome(run, seed, code, log, problem or ("it failed" if code else None))


def _call(command: list[str], folder: Path, file: Any) -> int:
    try:
        return subprocess.run(
            command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    except OSError as error:
        raise ValueError(f"{command[0]} can't be started: {error}") from error


def show(plan: Plan, console: Console) -> None:
    """The exact commands, to be pasted."""
    console.print(f"cd {shlex.quote(str(plan.results / LINKS))}", soft_wrap=True, highlight=False)
    for command in plan.commands:
        console.print(shlex.join(command), soft_wrap=True, highlight=False, markup=False)


def run_seahelm(
    prepared: str | Path,
    checkout: str | Path,
    *,
    output_dir: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    python: str | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> list[Outcome]:
    """`dudi seahelm run`: every run that has not ended, one after the other.

    Args:
        prepared: what `dudi seahelm prepare` wrote.
        checkout: a folder with SEA-HELM; it is not changed.
        output_dir: for the results; by default `results` in `prepared`.
        seeds: one run each; by default the eight of SEA-HELM's leaderboard.
        python: the interpreter; by default `uv run` with the checkout's environment.
        limit: rows of each task at most, to try things out.
        dry_run: make the folder of links and print the commands.

    Raises:
        ValueError: what `make_plan` raises, or a program that can't be started.
        SeahelmError: runs that did not end; all have been tried.
    """
    console = console or Console()
    plan = make_plan(
        prepared, checkout, output_dir=output_dir, seeds=seeds, python=python, limit=limit
    )
    console.print(plan.checkout.told(), soft_wrap=True, highlight=False)
    link(plan.checkout, plan.suites, plan.results / LINKS)
    if dry_run:
        show(plan, console)
        return []
    _remember(plan)
    outcomes = []
    for run in range(len(plan.commands)):
        try:
            outcomes.append(start(plan, run))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped in run {run}; the same command goes on with it."
            ) from None
        console.print(outcomes[-1].told(), soft_wrap=True, highlight=False, markup=False)
    bad = [outcome for outcome in outcomes if outcome.problem]
    if bad:
        raise SeahelmError("; ".join(outcome.told() for outcome in bad))
    console.print(f"Then: dudi seahelm report {plan.results}", soft_wrap=True, highlight=False)
    return outcomes
