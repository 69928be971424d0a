"""A vocabulary that the ranks of a process group share: each holds a run of a head's rows.

Runs follow one another in the order of the ranks. Ranks exchange small tensors: what a call is
made of, to find out before any sum that they agree; numbers per row, gathered and then reduced in
the order of the ranks, so that all have the same bits; and one sum of gradients a call.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from dudi_kernels import devices

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARDS: WeakValueDictionary[str, VocabularyShard] = WeakValueDictionary()  # by their key
# torch 2.13 has another name for it, and warns of the old one
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
WORDS = 16  # of an agreement: all have one size, so that two kinds can meet and be told apart
SHOWN = 8  # ranks in an error

Fact = int | float | torch.dtype
Facts = Mapping[str, Fact]
Table = list[dict[str, Any]]  # of each rank


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """This rank's place in a vocabulary: rows [start, stop) of it.

    Made by `LMHead.sharded`, which asks all ranks; a further head with the same rows may take it
    from there without asking again: `LMHead(weight, shard=head.shard)`.
    """

    group: ProcessGroup
    bounds: tuple[int, ...]  # where each rank's rows start, and the end
    rank: int  # in the group
    key: str = field(init=False)  # by which an operator finds it; equal ones have one

    def __post_init__(self) -> None:
        key = f"rank {self.rank} of {self.group.group_name}, {self.bounds}"
        object.__setattr__(self, "key", key)
        SHARDS[key] = self

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        return self.bounds[self.rank + 1]

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def vocab_size(self) -> int:
        """Of the whole vocabulary."""
        return self.bounds[-1]

    @property
    def largest(self) -> int:
        """Rows of the largest slice: plans are made for it, the same on all ranks."""
        return max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the group."""
        return tuple(dist.get_process_group_ranks(self.group))

    def same_as(self, other: VocabularyShard | None) -> bool:
        """Whether equal slices are on the same ranks."""
        return other is not None and (self.bounds, self.ranks) == (other.bounds, other.ranks)

    def local(self, targets: Tensor) -> Tensor:
        """Token ids counted from this rank's first row; -1 for those of other ranks."""
        own = targets - self.start
        return torch.where((own >= 0) & (own < self.rows), own, -1)

    # ---- collectives: each is called by all ranks, in one order ----------------------------------

    def gather(self, values: Tensor) -> Tensor:  # (...) -> (ranks, ...)
        """What each rank has, in the order of the ranks."""
        return gather(self.group, values)

    def sum_(self, *tensors: Tensor | None) -> None:
        """Sums over the ranks, in place."""
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                dist.all_reduce(tensor, group=self.group)

    def agree(self, device: torch.device, call: str, facts: Facts) -> Table:
        """As below; nothing is asked while a CUDA graph is captured, when the host can't read."""
        return [] if devices.capturing(device) else agree(self.group, device, call, facts)


def gather(group: ProcessGroup, values: Tensor) -> Tensor:
    """(...) of each rank as (ranks, ...)."""
    found = values.new_empty((dist.get_world_size(group), *values.shape))
    if values.numel():
        getattr(dist, ALL_GATHER)(found, values.contiguous()[None], group=group)
    return found


def agree(group: ProcessGroup, device: torch.device, call: str, facts: Facts) -> Table:
    """The facts of each rank, of which only those named "own ..." may differ.

    Raises:
        ValueError: on all ranks alike, with the name and the values of what differs.
    """
    names = list(facts)
    words = [zlib.crc32("\n".join((call, *names)).encode()), *map(_word, facts.values())]
    assert len(words) <= WORDS
    words += [0] * (WORDS - len(words))
    table = gather(group, torch.tensor(words, dtype=torch.int64, device=device)).tolist()
    if any(row[0] != table[0][0] for row in table):
        raise ValueError(
            f"every rank of the group must make the same call, got {call} on this one and another "
            "elsewhere"
        )
    found = [
        {
            name: _fact(word, like)
            for (name, like), word in zip(facts.items(), row[1:], strict=False)
        }
        for row in table
    ]
    for name in names:
        values = [own[name] for own in found]
        if not name.startswith("own ") and any(value != values[0] for value in values):
            listed = ", ".join(map(str, values[:SHOWN])) + (", ..." if values[SHOWN:] else "")
            raise ValueError(f"{name} must be the same on every rank of the group, got {listed}")
    return found


def digest(*settings: object) -> int:
    """Of settings that have no short form."""
    return zlib.crc32(repr(settings).encode())


def _word(fact: Fact) -> int:
    if isinstance(fact, torch.dtype):
        return DTYPES.index(fact)
    return struct.unpack("q", struct.pack("d", fact))[0] if isinstance(fact, float) else int(fact)


def _fact(word: int, like: Fact) -> Fact:
    if isinstance(like, torch.dtype):
        return DTYPES[word]
    return struct.unpack("d", struct.pack("q", word))[0] if isinstance(like, float) else word


# ---- the way in ----------------------------------------------------------------------------------


def is_distributed(value: object) -> bool:
    """Whether it is a DTensor; without importing what makes them."""
    return type(value).__name__ == "DTensor"


def local_rows(name: str, value: Any, mesh: Any) -> Any:
    """This rank's rows of a DTensor that is sharded by rows over `mesh`; others pass.

    Gradients go back to the DTensor, sharded as it is.
    """
    if not is_distributed(value):
        return value
    from torch.distributed.tensor import Shard

    if mesh is None or value.device_mesh != mesh:
        raise ValueError(f"{name} must be sharded over the mesh of weight, got {value.device_mesh}")
    if tuple(value.placements) != (Shard(0),):
        got = ", ".join(map(str, value.placements))
        raise ValueError(f"{name} must be sharded by rows, Shard(0) over a 1-D mesh, got {got}")
    return value.to_local()


def group_of(weight: object, group: Any) -> tuple[Any, Any]:
    """The process group that a head is sharded over, and the mesh where it is a DTensor."""
    mesh = getattr(weight, "device_mesh", None) if is_distributed(weight) else None
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(
            f"weight must be sharded over a mesh of one dimension, got {mesh.ndim}: take the "
            "submesh of the tensor-parallel one"
        )
    given = _process_group(group)
    own = given if mesh is None else mesh.get_group()
    if own is None:
        raise ValueError("group must be given with a plain tensor, got None")
    ranks = dist.get_process_group_ranks(own)
    if mesh is not None and mesh.mesh.tolist() != ranks:
        raise ValueError(f"the mesh of weight must have its ranks in order, got {mesh.mesh}")
    if given is not None and dist.get_process_group_ranks(given) != ranks:
        raise ValueError(
            f"group must be that of the mesh of weight, of ranks {ranks}, got "
            f"{dist.get_process_group_ranks(given)}"
        )
    return own, mesh


def _process_group(group: Any) -> Any:
    """Of a group, or of a mesh of one dimension."""
    if group is None or isinstance(group, getattr(dist, "ProcessGroup", ())):
        return group
    if hasattr(group, "get_group") and getattr(group, "ndim", 0) == 1:
        return group.get_group()
    raise TypeError(
        f"group must be a ProcessGroup or a DeviceMesh of one dimension, got {type(group).__name__}"
    )


def place(
    group: ProcessGroup,
    rows: int,
    device: torch.device,
    start: int | None,
    vocab_size: int | None,
    facts: Facts,
) -> VocabularyShard:
    """Ask all ranks how many rows they hold; `start` and `vocab_size` say what is expected."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    own = {"own rows": rows, "own start": -1 if start is None else start}
    expected = {"vocab_size": -1 if vocab_size is None else vocab_size}
    table = agree(group, device, "LMHead.sharded", {**own, **expected, **facts})
    bounds = [0]
    for i in range(world):
        size, first = table[i]["own rows"], table[i]["own start"]
        if size < 1:
            raise ValueError(f"every rank must hold rows of the vocabulary, got none on rank {i}")
        if first not in (-1, bounds[-1]):
            kind = "a gap" if first > bounds[-1] else "an overlap"
            raise ValueError(
                f"start must be {bounds[-1]} on rank {i}, where the rows of the ranks before end, "
                f"got {first}: {kind}"
            )
        bounds.append(bounds[-1] + size)
    if vocab_size is not None and bounds[-1] != vocab_size:
        raise ValueError(
            f"vocab_size must be {bounds[-1]}, the rows of all ranks together, got {vocab_size}"
        )
    return VocabularyShard(group, tuple(bounds), rank)
