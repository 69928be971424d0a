"""Rows of tensors by key, on disk: safetensors shards that are named after the hash of their bytes.

A shard holds the rows of many entries one after another, their keys and where each begins. It is
written under a temporary name and renamed when it is whole, so a writer that is killed leaves whole
shards only. What is read is memory-mapped; every byte has been compared with the name before.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY_BYTES = 16
KEYS, STARTS = "keys", "starts"  # beside the fields of the entries
PREFIX, SUFFIX, TEMPORARY, ASIDE = "shard-", ".safetensors", ".tmp", ".damaged"
BLOCK = 2**22  # bytes read at a time


class DamagedError(ValueError):
    """A file whose bytes are not those that were written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.path = path


def set_aside(path: Path) -> Path:
    """Keep a damaged file under a name that nothing reads."""
    aside = path.with_name(path.name + ASIDE)
    if path.exists():
        os.replace(path, aside)
    return aside


def file_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def save_named(
    folder: Path, prefix: str, tensors: Mapping[str, Tensor], header: dict[str, str]
) -> Path:
    """Write tensors to `prefix` + the hash of the file's bytes; whole or not at all."""
    temporary = folder / f"{prefix}{uuid.uuid4().hex}{TEMPORARY}"
    try:
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, temporary, header)
        final = folder / f"{prefix}{file_hash(temporary)}{SUFFIX}"
        os.replace(temporary, final)
    except SafetensorError as error:  # a full disk, among others
        raise OSError(f"{folder} can't be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return final


def open_named(path: Path, header: Mapping[str, str], remedy: str) -> Any:
    """A memory-mapped file of `save_named`, compared with its name and with what it must be.

    Raises DamagedError where its bytes changed, ValueError for a file from elsewhere.
    """
    try:
        found = file_hash(path)
        if not path.name.endswith(f"{found}{SUFFIX}"):
            told = f"the hash of its content is {found}, not the one in its name"
            raise DamagedError(path, f"is corrupt: {told}; {remedy}")
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DamagedError(path, f"can't be read: {error}; {remedy}") from error
    given = file.metadata() or {}
    for name, wanted in header.items():
        if given.get(name) != wanted:
            raise ValueError(
                f"{path} does not belong here: its {name} is {given.get(name)!r}, wanted "
                f"{wanted!r}; remove it"
            )
    return file


class _Place(NamedTuple):
    shard: int
    start: int
    stop: int


class Shards:
    """What the shards of a folder hold, all of them verified.

    quarantine: where damaged shards go, which are then not read; without it they are errors.
    Raises ValueError, naming the file, for a shard whose bytes or header are not what they should.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, str],
        remedy: str,
        quarantine: list[DamagedError] | None = None,
    ) -> None:
        self.files: list[Any] = []
        self.index: dict[bytes, _Place] = {}
        for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
            try:
                self._add(open_named(path, header, remedy))
            except DamagedError as error:
                if quarantine is None:
                    raise
                quarantine.append(error)

    def _add(self, file: Any) -> None:
        keys, starts = file.get_tensor(KEYS).numpy(), file.get_tensor(STARTS).tolist()
        for i, key in enumerate(keys):
            self.index[key.tobytes()] = _Place(len(self.files), starts[i], starts[i + 1])
        self.files.append(file)

    def __contains__(self, key: bytes) -> bool:
        return key in self.index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def rows(self) -> int:
        return sum(place.stop - place.start for place in self.index.values())

    def read(self, key: bytes, fields: Sequence[str]) -> list[Tensor]:
        """The rows of one entry."""
        shard, start, stop = self.index[key]
        return [self.files[shard].get_slice(name)[start:stop] for name in fields]


class ShardWriter:
    """Collects entries and writes a shard whenever `max_bytes` of them are there."""

    def __init__(self, folder: Path, header: dict[str, str], max_bytes: int) -> None:
        self.folder, self.header, self.max_bytes = folder, header, max_bytes
        for left in folder.glob(f"{PREFIX}*{TEMPORARY}"):  # by a writer that was killed
            left.unlink()
        self._begin()

    def _begin(self) -> None:
        self.keys: list[bytes] = []
        self.parts: list[dict[str, Tensor]] = []
        self.bytes = 0

    def add(self, key: bytes, rows: dict[str, Tensor]) -> None:
        self.keys.append(key)
        self.parts.append(rows)
        self.bytes += sum(t.numel() * t.element_size() for t in rows.values())
        if self.bytes >= self.max_bytes:
            self.flush()

    def flush(self) -> None:
        if not self.keys:
            return
        tensors = {name: torch.cat([p[name] for p in self.parts]) for name in self.parts[0]}
        lengths = torch.tensor([0] + [len(next(iter(p.values()))) for p in self.parts])
        tensors[KEYS] = _as_bytes(self.keys)
        tensors[STARTS] = lengths.cumsum(0)
        save_named(self.folder, PREFIX, tensors, self.header)
        self._begin()


def _as_bytes(keys: Iterable[bytes]) -> Tensor:  # (n, KEY_BYTES) uint8
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
