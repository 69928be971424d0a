"""Every test draws the same numbers. The torch backend runs with the compiled steps and without
them; the Triton backend once, interpreted."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dudi_kernels.backends import native
from dudi_kernels.backends.native import gemm

torch.manual_seed(0)  # for cases that are drawn at import: every process has the same


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    kept = []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        triton = parameters.get("backend") == "triton"
        if triton and importlib.util.find_spec("triton") is None:
            item.add_marker(pytest.mark.skip("triton is not installed"))
        if not (triton and parameters.get("_steps") == "plain"):  # they are the torch backend's
            kept.append(item)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def _steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = request.node.callspec.params
    if parameters.get("backend") == "triton":
        return
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(gemm, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the compiled steps are not built: no C++ compiler at installation")
