"""The policy that the preference signal measures progress from.

`initial` is the student as training found it, `lagged` a snapshot of it refreshed every k steps
(the SPIN iterate). Only trainable parameters are copied: with an adapter that is the adapter, and a
new adapter, which changes nothing yet, is not even copied but switched off. To score, the snapshot
is swapped into the live model for one forward pass and swapped out again.
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
            name: p.detach().to(device=device, dtype=dtype, copy=True)
            for name, p in self._trainable(model)
        }

    @staticmethod
    def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Take the model as it is now."""
        for name, parameter in self._trainable(model):
            self.weights[name].copy_(parameter)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the snapshot's weights."""
        live = dict(self._trainable(model))
        own = {name: parameter.data for name, parameter in live.items()}
        try:
            for name, parameter in live.items():
                parameter.data = self.weights[name].to(parameter)
            yield
        finally:
            for name, parameter in live.items():
                parameter.data = own[name]

    def save(self, folder: str | Path) -> None:
        tensors: dict[str, Tensor] = {n: w.contiguous().cpu() for n, w in self.weights.items()}
        save_file(tensors, Path(folder) / REFERENCE_FILE)

    def mismatches(self, folder: str | Path) -> list[str]:
        """What the snapshot in `folder` has otherwise than this model, without reading weights."""
        path = Path(folder) / REFERENCE_FILE
        if not path.exists():
            return [f"the reference policy {REFERENCE_FILE} is not there"]
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
        for name, weight in load_file(Path(folder) / REFERENCE_FILE).items():
            self.weights[name].copy_(weight)


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
