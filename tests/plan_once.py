"""Peak memory of two real steps, for test_planning.py: `plan_once.py OPTIONS` prints bytes.

What counts is the peak of the resident set above that of a process which has run a tiny step
before, so that libraries are loaded. Large blocks go back to the system when they are freed: the
caller sets glibc's limits.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny

from dudi.config import from_options
from dudi.run import build_trainer
from dudi.trainer import DuDiTrainer


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} in /proc/self/status")


def warm_up() -> None:
    with tempfile.TemporaryDirectory() as folder:
        DuDiTrainer(
            tiny.model(0),
            tiny.model(1),
            args=tiny.config(folder, max_steps=1),
            train_dataset=tiny.rows(4),
            processing_class=tiny.tokenizer(),
        ).train()
    gc.collect()


def main(options: dict[str, Any]) -> None:
    if options.get("use_peft"):
        import peft  # noqa: F401  # its code is not the run's memory
    warm_up()
    before = resident("VmRSS")
    assert resident("VmHWM") < before * 1.3  # the peak to come is higher
    build_trainer(*from_options(options)).train()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
