"""The policy that the preference signal measures progress from.

`initial` is the student as training found it, `lagged` a snapshot of it refreshed every k steps
(the SPIN iterate). Only trainable parameters are copied: with an adapter that is the adapter, and a
new adapter, which changes nothing yet, is not even copied but switched off. To score, the snapshot
is swapped into the live model for one forward pass and swapped out again. Of a sharded student each
rank copies, swaps and saves its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dudi.sharding import is_sharded, local

REFERENCE_FILE = "reference.safetensors"


def make_reference(model: Any, args: Any) -> Reference | AdapterOff:
    """What `args.reference`, initial or lagged, asks for."""
    if args.reference == "initial" and adds_nothing(model):
        return AdapterOff()
    dtype = None if args.reference_dtype is None else getattr(torch, args.reference_dtype)
    return Reference(model, dtype, torch.device("cpu") if args.reference_on_cpu else None)


def adds_nothing(model: Any) -> bool:
    """Whether all that is trained is an adapter which changes nothing: a LoRA whose B is zero."""
    if not hasattr(model, "disable_adapter"):
        return False
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not all(".lora_A." in name or ".lora_B." in name for name, _ in trained):
        return False
    return not any(bool(p.any()) for name, p in trained if ".lora_B." in name)


class AdapterOff:
    """The model under its adapter, at no memory."""

    def refresh(self, model: nn.Module) -> None:
        raise AssertionError("a lagged reference is a copy")

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        return model.disable_adapter()

    def save(self, folder: str | Path) -> None:
        """There is nothing to save."""

    def mismatches(self, folder: str | Path) -> list[str]:
        return []

    def load(self, folder: str | Path) -> None:
        """There is nothing to load."""


class Reference:
    """A frozen copy of a model's trainable parameters."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,  # None: the parameters' own
        device: torch.device | None = None,
    ):
        self.weights = {
            name: local(p.detach()).to(device=device, dtype=dtype, copy=True)
            for name, p in self._trainable(model)
        }
        rank = torch.distributed.get_rank() if is_sharded(model) else None
        self.file = REFERENCE_FILE if rank is None else f"reference-{rank}.safetensors"

    @staticmethod
    def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Take the model as it is now."""
        for name, parameter in self._trainable(model):
            self.weights[name].copy_(local(parameter))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the snapshot's weights."""
        live = dict(self._trainable(model))
        own: dict[str, Tensor] = {}
        try:
            for name, parameter in live.items():
                own[name] = _swap(parameter, self.weights[name])
            yield
        finally:
            for name, value in own.items():
                _swap(live[name], value)

    def save(self, folder: str | Path) -> None:
        tensors: dict[str, Tensor] = {n: w.contiguous().cpu() for n, w in self.weights.items()}
        save_file(tensors, Path(folder) / self.file)

    def mismatches(self, folder: str | Path) -> list[str]:
        """What the snapshot in `folder` has otherwise than this model, without reading weights."""
        path = Path(folder) / self.file
        if not path.exists():
            return [f"the reference policy {self.file} is not there"]
        with safe_open(path, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        own = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        return [
            f"reference {name}: checkpoint {saved.get(name, 'without')}, "
            f"model {own.get(name, 'without')}"
            for name in sorted(saved.keys() | own.keys())
            if saved.get(name) != own.get(name)
        ][:3]

    def load(self, folder: str | Path) -> None:
        """Take the snapshot in `folder`; it has no `mismatches`."""
        for name, weight in load_file(Path(folder) / self.file).items():
            self.weights[name].copy_(weight)


@torch.no_grad()
def _swap(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter another value; returns its own."""
    if isinstance(parameter, DTensor):  # FSDP gathers from this memory, whatever `data` is
        part = local(parameter)
        own = part.clone()
        part.copy_(value)
        return own
    own, parameter.data = parameter.data, value.to(parameter)
    return own


class KnownScores:
    """Log-probabilities of y+ under a reference that never changes, by row of the data."""

    def __init__(self) -> None:
        self.by_row: dict[int, float] = {}

    def state(self) -> dict[str, Tensor]:
        rows = torch.tensor(list(self.by_row), dtype=torch.long)
        values = torch.tensor(list(self.by_row.values()), dtype=torch.float32)
        return {"reference_rows": rows, "reference_log_probs": values}

    def load(self, state: dict[str, Tensor]) -> None:
        rows, values = state["reference_rows"].tolist(), state["reference_log_probs"].tolist()
        self.by_row = dict(zip(rows, values, strict=True))
