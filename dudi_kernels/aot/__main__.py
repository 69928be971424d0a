"""python -m dudi_kernels.aot: compile the Triton kernels for GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dudi_kernels.aot import roofline
from dudi_kernels.aot.targets import GPUS, ROWS, SHAPES, Gpu, Shape
from dudi_kernels.divergences import DIVERGENCES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = "{:8} {:4} {:16} {:8} {:18} {:>9} {:>7} {:>8} {:>8} {:>5} {:>6}"
HEADER = (
    "target", "type", "divergence", "logits", "kernel", "registers", "spilled", "shared",
    "programs", "mma", "bound",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m dudi_kernels.aot", description=__doc__)
    found.add_argument("--target", nargs="+", choices=GPUS, default=list(GPUS))
    found.add_argument("--divergence", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    found.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    found.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    found.add_argument("--roofline", action="store_true", help="the costs on paper, and no more")
    found.add_argument("--json", type=Path, metavar="FILE", help="all of it")
    return found


def reports(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each kernel; shapes that give the same machine code share it, with a bound each."""
    found = []
    for target in arguments.target:
        for name in arguments.dtype:
            for divergence in arguments.divergence:
                for fused in (True, False):
                    common = {"target": target, "dtype": name, "divergence": divergence}
                    for report in _compiled(GPUS[target], name, divergence, fused, arguments.shape):
                        found.append(common | report)
                        print(_line(found[-1]), flush=True)
    return found


def _compiled(
    gpu: Gpu, dtype: str, divergence: str, fused: bool, shapes: list[str]
) -> list[dict[str, Any]]:
    from dudi_kernels.aot import compile, machine_code

    seen: dict[tuple[str, int], dict[str, Any]] = {}
    codes: dict[tuple[str, int], list[Any]] = {}
    for name in shapes:
        shape = SHAPES[name]
        for launch in compile.compile_all(gpu, shape, ROWS, DTYPES[dtype], divergence, fused=fused):
            key = launch.kernel, id(launch.compiled)
            if key not in seen:
                codes[key] = code = machine_code.instructions(launch.compiled, gpu)
                found = machine_code.resources(launch.compiled, gpu)
                counts = machine_code.by_class(code, gpu)
                seen[key] = {
                    "kernel": launch.kernel,
                    "projects": fused,
                    "descriptors": bool(launch.arguments.get("DESCRIPTORS")),
                    "blocks": launch.blocks._asdict(),
                    **found._asdict(),
                    "instructions": dict(counts),
                    "bounds": {},
                    "refused": [],
                }
            seen[key]["refused"] += compile.limits(launch)
            if value := _bound(seen[key], codes[key], launch, gpu, shape, fused):
                seen[key]["bounds"][name] = value
    return list(seen.values())


def _bound(
    report: dict[str, Any], code: list[Any], launch: Any, gpu: Gpu, shape: Shape, fused: bool
) -> dict[str, float] | None:
    from dudi_kernels.aot import bound, machine_code

    if not fused or not report["instructions"].get("mma"):
        return None
    found = machine_code.Resources(*(report[name] for name in machine_code.Resources._fields))
    value = bound.bound(code, found, gpu, launch.blocks, shape)
    return None if value is None else value._asdict()


def _line(report: dict[str, Any]) -> str:
    bounds = [value["use"] for value in report["bounds"].values()]
    programs = [value["programs"] for value in report["bounds"].values()]
    return COLUMNS.format(
        report["target"],
        report["dtype"],
        report["divergence"],
        "made" if report["projects"] else "read",
        report["kernel"],
        report["registers"],
        report["spilled"],
        report["shared"],
        programs[0] if programs else "",
        report["instructions"].get("mma", 0),
        f"{min(bounds):.0%}" if bounds else "",
    ) + "".join(f"\n    refused: {reason}" for reason in report["refused"])


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.roofline:
        print(roofline.table())
        return 0
    if os.environ.pop("TRITON_INTERPRET", None) == "1":
        print("TRITON_INTERPRET is ignored", file=sys.stderr)
    print(COLUMNS.format(*HEADER))
    found = reports(arguments)
    if arguments.json is not None:
        part = arguments.json.with_name(arguments.json.name + ".part")
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(arguments.json)
    wrong = [r for r in found if r["spilled"] or r["refused"]]
    print(f"{len(found)} kernels compiled; {len(wrong)} spill or would be refused")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
