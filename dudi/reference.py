"""The policy that the preference signal measures progress from.

`initial` is the student as training found it, `lagged` a snapshot of it refreshed every k steps
(the SPIN iterate). Only trainable parameters are copied: with an adapter that is the adapter. To
score, the snapshot is swapped into the live model for one forward pass and swapped out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

REFERENCE_FILE = "reference.safetensors"


class Reference:
    """A frozen copy of a model's trainable parameters."""

    def __init__(self, model: nn.Module):
        self.weights = {name: p.detach().clone() for name, p in self._trainable(model)}

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
                parameter.data = self.weights[name].to(parameter.device)
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
