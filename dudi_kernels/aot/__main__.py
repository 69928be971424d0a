"""python -m dudi_kernels.aot: compile the Triton kernels for GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from dudi_kernels.aot import roofline
from dudi_kernels.aot.targets import GPUS, SHAPES
from dudi_kernels.divergences import DIVERGENCES

DTYPES = ("bf16", "fp16", "fp32")
CLASSES = "classes"  # the variant that is the maps of a verbalizer


def parser() -> argparse.ArgumentParser:
    from dudi_kernels.aot.compile import VARIANTS

    found = argparse.ArgumentParser(prog="python -m dudi_kernels.aot", description=__doc__)
    found.add_argument("--target", nargs="+", choices=GPUS, default=list(GPUS))
    found.add_argument("--divergence", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    found.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    found.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    variants = [*VARIANTS, CLASSES]
    found.add_argument("--variant", nargs="+", choices=variants, default=["plain"])
    found.add_argument("--json", type=Path, metavar="FILE", help="all that is found")
    found.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="of such files alone")
    found.add_argument("--roofline", action="store_true", help="the costs on paper, and no more")
    return found


def main(argv: list[str] | None = None) -> int:
    if os.environ.pop("TRITON_INTERPRET", None) == "1":
        print("TRITON_INTERPRET is ignored", file=sys.stderr)
    from dudi_kernels.aot import report

    arguments = parser().parse_args(argv)
    if arguments.roofline:
        print(roofline.table())
        return 0
    if arguments.table:
        parts = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.table]
        print(report.table([own for part in parts for own in part]))
        return 0
    print(report.HEADER)
    found = []
    for own in _reports(arguments):
        found.append(own)
        print(report.line(own), flush=True)
    if arguments.json is not None:
        part = arguments.json.with_name(arguments.json.name + ".part")
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(arguments.json)
    wrong = sum(bool(own["wrong"]) for own in found)
    print(f"{len(found)} kernels compiled; something is wrong with {wrong}")
    return 1 if wrong else 0


def _reports(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from dudi_kernels.aot import report

    variants = [name for name in arguments.variant if name != CLASSES]
    for about in product(arguments.target, arguments.dtype, arguments.divergence, variants):
        yield from report.reports(*about, shapes=arguments.shape)
    if CLASSES in arguments.variant:  # of every dtype and divergence
        for target in arguments.target:
            yield from report.of_maps(target, arguments.shape)


if __name__ == "__main__":
    sys.exit(main())
