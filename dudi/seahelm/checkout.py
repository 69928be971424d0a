"""A SEA-HELM checkout: what it is, whether our command fits it, and a folder to run it from.

SEA-HELM reads its suites from seahelm_tasks/task_config.yaml of the folder that it is started in.
To run a suite of ours the checkout is left as it is; `link` makes a folder of links to it in which
that one file is ours.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dudi.callbacks import write_text
from dudi.seahelm.facts import facts

ENTRY = "src/seahelm_evaluation.py"
TASK_FOLDER = "seahelm_tasks"
SUITES = f"{TASK_FOLDER}/task_config.yaml"
NEEDED = (ENTRY, SUITES, "chat_templates/base_model.jinja")
NOT_LINKED = (TASK_FOLDER, "results", "logs")
REFERENCE = re.compile(r"\$\{([^}]+)\}")


@dataclass(frozen=True)
class Checkout:
    path: Path
    commit: str | None
    version: str | None  # of its pyproject.toml

    def told(self) -> str:
        """What it is, beside the version that our formats were read from."""
        known = facts()
        tested = f"{known['version']} ({known['commit'][:7]})"
        if self.commit == known["commit"]:
            return f"SEA-HELM {tested}, the version that this was tested against"
        own = f"version {self.version or 'unknown'}, commit {(self.commit or 'unknown')[:7]}"
        return f"SEA-HELM of {own}; tested against {tested}: tasks and result files may differ"


def open_checkout(path: str | Path) -> Checkout:
    """A checkout, with the files that a run needs.

    Raises:
        ValueError: no folder, or one that is not SEA-HELM.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(f"checkout must be a folder, got {folder}, which is none")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ValueError(f"checkout {folder} is not SEA-HELM: it has no {name}")
    return Checkout(folder, _commit(folder), _version(folder))


def _commit(folder: Path) -> str | None:
    """The commit that is checked out; None where the folder is no repository of its own."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(folder: Path) -> str | None:
    path = folder / "pyproject.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(r'^version\s*=\s*"([^"]+)"', text, re.MULTILINE)
    return match[1] if match else None


# ---- does our command fit ------------------------------------------------------------------------


def check_options(checkout: Checkout, command: list[str]) -> None:
    """Raise for an option of our command that the entry script does not have."""
    text = (checkout.path / ENTRY).read_text(encoding="utf-8")
    known = set(re.findall(r"""["'](--\w+)["']""", text))
    for word in command[command.index(ENTRY) + 1 :]:
        if word.startswith("--") and word not in known:
            raise ValueError(f"checkout {checkout.path}: {ENTRY} has no option {word}")


def known_tasks(checkout: Checkout) -> dict[str, set[str]]:
    """The languages of each task, and of each group of tasks, from the config.yaml files."""
    configs: dict[str, Any] = {}
    for path in sorted((checkout.path / TASK_FOLDER).rglob("config.yaml")):
        try:
            configs |= yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, TypeError) as error:
            raise ValueError(f"{path} must hold tasks by name: {error}") from error
    found: dict[str, set[str]] = {}
    for name, config in configs.items():
        languages = set(_followed(config.get("languages") or {}, configs))
        for key in (name, config.get("aggregation_group")):
            if key is not None:
                found[key] = found.get(key, set()) | languages
    return found


def _followed(value: Any, configs: dict[str, Any]) -> Any:
    """What a `${task.key}` of OmegaConf stands for."""
    while isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
        value = configs
        for key in match[1].split("."):
            value = value.get(key, {}) if isinstance(value, dict) else {}
    return value if isinstance(value, dict) else {}


def check_suite(checkout: Checkout, suite: dict[str, list[str]]) -> None:
    """Raise for a task that the checkout has not, or not in the language."""
    known = known_tasks(checkout)
    for language, names in suite.items():
        for name in names:
            if name not in known:
                raise ValueError(f"checkout {checkout.path} has no task {name!r}")
            if language not in known[name]:
                raise ValueError(
                    f"checkout {checkout.path} has task {name!r} in "
                    f"{', '.join(sorted(known[name]))}, not in {language}"
                )


# ---- a folder to run it from ---------------------------------------------------------------------


def link(checkout: Checkout, suites: str, folder: Path) -> None:
    """Fill `folder` with links to the checkout, with `suites` as its task_config.yaml."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / TASK_FOLDER).mkdir(parents=True)
    for child in checkout.path.iterdir():
        if child.name not in NOT_LINKED:
            (folder / child.name).symlink_to(child)
    for child in (checkout.path / TASK_FOLDER).iterdir():
        if child.name != Path(SUITES).name:
            (folder / TASK_FOLDER / child.name).symlink_to(child)
    write_text(folder / SUITES, suites)
