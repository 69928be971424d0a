"""Every test draws the same numbers, and runs with the compiled steps and without them."""

from __future__ import annotations

import pytest
import torch

from dudi_kernels.backends import native
from dudi_kernels.backends.native import gemm


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def _steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(gemm, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the compiled steps are not built: no C++ compiler at installation")
