"""Bytes alive, by part, and FLOPs, while torch runs on tensors that have shapes but no numbers.

A dispatch mode sees the result of every operator. It adds up the storages behind them, each once
and under the part that is being planned, takes them off when torch frees them, and keeps what was
alive at the highest point. Autograd holds and frees fake tensors as it would hold real ones, so
this is right for any architecture, with gradient checkpointing too.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Peak(NamedTuple):
    parts: dict[str, int]  # bytes at the highest point
    flops: int

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class _Entry:
    __slots__ = ("bytes", "part", "reference")

    def __init__(self, reference: Any, part: str, size: int) -> None:
        self.reference, self.part, self.bytes = reference, part, size


class Live(TorchDispatchMode):
    """Inside, new tensors count under `part`; `watch` tells the peak of what runs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.live: Counter[str] = Counter()
        self._entries: dict[int, _Entry] = {}
        self._total = self._highest = self._flops = 0
        self._at_highest: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, self.part)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=result)
        return result

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors made outside under `part`, or move those already counted there."""
        for tensor in tensors:
            entry = self._entries.get(id(tensor.untyped_storage()))
            if entry is None:
                self._see(tensor, part)
            else:
                self.live[entry.part] -= entry.bytes
                self.live[part] += entry.bytes
                entry.part = part

    @contextmanager
    def under(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def watch(self, function: Callable[[], Any]) -> tuple[Any, Peak]:
        """Call `function`; its result and the peak meanwhile, what was alive before included."""
        self._highest, self._flops = -1, 0
        self._note()
        result = function()
        parts = {part: size for part, size in self._at_highest.items() if size}
        return result, Peak(parts, self._flops)

    def _see(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps the Python object as long as the storage
        if key in self._entries:
            return
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._entries[key] = _Entry(reference, part, size)
        self.live[part] += size
        self._total += size
        self._note()

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.live[entry.part] -= entry.bytes
        self._total -= entry.bytes

    def _note(self) -> None:
        if self._total > self._highest:
            self._highest, self._at_highest = self._total, dict(self.live)


# ---- FLOPs that torch has no formula for: attention on a CPU -------------------------------------


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Scores and their product with the values; a mask saves nothing."""
    return 2 * _scores(query, key) * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    """The scores again, and two GEMMs for each of the forward's."""
    return 2 * _scores(query, key) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _scores(query: Tensor, key: Tensor) -> int:
    batch, heads, length, _ = query.shape
    return batch * heads * length * key.shape[-2]


_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(torch.ops.aten, _CPU_ATTENTION): _attention,
    getattr(torch.ops.aten, f"{_CPU_ATTENTION}_backward"): _attention_backward,
    **flop_registry,
}
