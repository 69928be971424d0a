"""How a checkpoint comes to be: written beside its place, made durable, then renamed.

    _saving/checkpoint-N/...   all that the Trainer and every rank write
    manifest.json in it        last: the size of each file
    fsync of files and folders, one rename to checkpoint-N

A kill at any moment leaves checkpoint-N whole or absent, and at most a folder `_saving`, which the
next start removes. A disk that lost or cut files afterwards is found out by the manifest.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

STAGING = "_saving"  # uploads to the Hub leave out what begins with _
MANIFEST_FILE = "manifest.json"
RUST_ERROR = "(os error "  # tokenizers tells of a failed write in a bare Exception
OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
TORCH_WRITER = "inline_container"  # torch.save tells of a failed write in a bare RuntimeError


class DiskError(RuntimeError):
    """A disk is full, read-only or broken; the message says what could not be written."""


@contextmanager
def disk_errors(path: Path, hint: Callable[[], str] = str) -> Iterator[None]:
    """Tell that `path` could not be written, whichever library found out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | SafetensorError) or RUST_ERROR in str(error):
            raise _told(path, error, hint()) from error
        if TORCH_WRITER in str(error):
            raise _told(path, "a file was cut short", hint()) from error
        raise


@contextmanager
def run_disk_errors(folder: Path, hint: Callable[[], str]) -> Iterator[None]:
    """The same for all that a run does: TensorBoard and others write files of their own."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_A_DISK:
            raise
        raise _told(folder, error, hint()) from error


def _told(path: Path, reason: object, hint: str) -> DiskError:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e6
    return DiskError(
        f"{path} could not be written: {reason} ({free:,.0f} MB are free). {hint}".rstrip()
    )


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(staged: Path, final: Path) -> None:
    """Give a checkpoint that is complete its manifest and its name."""
    sizes = {str(p.relative_to(staged)): p.stat().st_size for p in _files(staged)}
    (staged / MANIFEST_FILE).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    put_in_place(staged, final)


def put_in_place(staged: Path, final: Path) -> None:
    """Make a folder durable and give it its name; one that has the name goes."""
    for path in (*_files(staged), *(p for p in staged.rglob("*") if p.is_dir()), staged):
        sync(path)
    if final.exists():
        final.rename(staged.with_name(f"{final.name}-before"))
    staged.rename(final)
    sync(final.parent)


def flaw(folder: Path) -> str | None:
    """What a checkpoint's files have otherwise than its manifest says."""
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        sizes = {str(name): int(size) for name, size in json.loads(text)["files"].items()}
    except OSError:
        return f"it has no {MANIFEST_FILE}, which is written last"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST_FILE} can't be read"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is not there"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def discard_staging(run_dir: Path) -> None:
    """Remove what a save that did not end has left."""
    shutil.rmtree(run_dir / STAGING, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())
