"""Options of `pytest bench/`, and the results of a session, written at its end."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import device_of
from bench.report import Results, target_table, write_all
from bench.smollm2 import CACHE

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="a tiny shape: does everything run?")
    group.addoption("--all", action="store_true", help="every case; takes hours on a CPU")
    group.addoption("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    group.addoption("--rounds", type=int, default=5, help="in which all take turns")
    group.addoption("--results", default=str(Path(__file__).parent / "results"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # other libraries' warnings are theirs
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session", autouse=True)
def _states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Real states are made once in a session, not in each process that measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("states")))
        yield


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    config = request.config
    return 1 if config.getoption("--quick") else config.getoption("--rounds")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return device_of(request.config)


@pytest.fixture(scope="session")
def dtype(device: str) -> torch.dtype:
    """Of the sweeps."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash[RESULTS]
    if found.cases or found.tables:
        folder = Path(session.config.getoption("--results"))
        write_all(found, folder, device_of(session.config))
        if importlib.util.find_spec("matplotlib") is not None:
            from bench.plots import draw

            draw(found, folder)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[RESULTS].cases:
        terminalreporter.write(target_table(config.stash[RESULTS]))


@pytest.fixture(autouse=True)
def _free() -> Iterator[Any]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
