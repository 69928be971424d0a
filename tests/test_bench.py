"""`pytest bench/` runs and writes its results, without any other library installed."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench.measure import Turns

ROOT = Path(__file__).parents[1]


def test_a_quick_session(tmp_path: Path) -> None:
    chosen = "forward_kl and not skew"
    words = ("bench", "--quick", "-q", "-k", chosen, "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--results", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    cases = {(c["task"], c["contender"]): c for c in summary["cases"]}
    assert {("forward_kl", "ours"), ("forward_kl", "dense")} <= cases.keys()
    for case in cases.values():
        assert case["ratio"] > 0 and case["peak_bytes"] > 0 and case["gradient_error"] < 1e-5
    assert "| forward_kl | **ours** |" in (tmp_path / "table.md").read_text()


def test_all_take_turns() -> None:
    seen: list[str] = []
    turns = Turns({name: partial(seen.append, name) for name in ("floor", "ours")}, cuda=False)
    for _ in range(2):
        turns.take(*turns.steps)
    assert seen == ["floor", "ours"] * 2
    assert [len(times) for times in turns.seconds.values()] == [2, 2]
