"""What is said about compiled kernels, what is wrong with them, and tables for docs/kernels.md."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dudi_kernels.aot import bound, class_maps, compile, machine_code
from dudi_kernels.aot.machine_code import Instruction, Resources
from dudi_kernels.aot.targets import GPUS, ROWS, SHAPES, Gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROJECTING = ("statistics", "sums", "gradient")

Report = dict[str, Any]  # as JSON


def reports(
    target: str, dtype: str, divergence: str, variant: str, shapes: Iterable[str]
) -> Iterator[Report]:
    """One for each kernel; shapes that give the same machine code share it, with a bound each."""
    gpu, about = GPUS[target], {"target": target, "dtype": dtype, "divergence": divergence}
    for fused in (True, False):
        found: dict[tuple[str, int], Report] = {}
        for name in shapes:
            for launch in compile.compile_all(
                gpu,
                SHAPES[name],
                ROWS,
                DTYPES[dtype],
                divergence,
                fused=fused,
                variant=variant,
            ):
                key = launch.kernel, id(launch.compiled)
                if key not in found:
                    found[key] = {**about, "variant": variant, "projects": fused}
                    found[key] |= _of(launch, gpu)
                _add(found[key], launch, gpu, name)
        yield from found.values()


def of_maps(target: str, shapes: Iterable[str]) -> Iterator[Report]:
    """One for each kernel between tokens and classes."""
    gpu, about = GPUS[target], {"target": target, "dtype": "fp32", "divergence": "any"}
    found: dict[int, Report] = {}
    for name in shapes:
        for launch in class_maps.compile_maps(gpu, SHAPES[name]):
            if (key := id(launch.compiled)) not in found:
                found[key] = {**about, "variant": "classes", "projects": False}
                found[key] |= _of(launch, gpu)
            _add(found[key], launch, gpu, name)
    yield from found.values()


@functools.lru_cache(maxsize=64)
def _parts(compiled: Any, gpu: Gpu) -> tuple[list[Instruction], Resources]:
    return machine_code.instructions(compiled, gpu), machine_code.resources(compiled, gpu)


def _of(launch: compile.Launch, gpu: Gpu) -> Report:
    """What does not depend on the shape."""
    code, resources = _parts(launch.compiled, gpu)
    _, loops = bound.width_loops(code, gpu)
    return {
        "kernel": launch.kernel,
        "descriptors": bool(launch.arguments.get("DESCRIPTORS")),
        "blocks": launch.blocks._asdict(),
        **resources._asdict(),
        "layout": machine_code.layout(launch.compiled),
        "programs": bound.programs(resources, gpu),
        "instructions": dict(machine_code.by_class(code, gpu)),
        "loops": [
            dict(machine_code.by_class(machine_code.inside(code, loop), gpu)) for loop in loops
        ],
        "bounds": {},
        "wrong": [],
    }


def _add(report: Report, launch: compile.Launch, gpu: Gpu, shape: str) -> None:
    wrong = [*compile.limits(launch, gpu), *_faults(report, gpu)]
    report["wrong"] += [reason for reason in wrong if reason not in report["wrong"]]
    if not _multiplies(report, gpu) or report["dtype"] == "fp32":  # rates are of half precision
        return
    code, resources = _parts(launch.compiled, gpu)
    widths = [w for w in (launch.arguments["t_width"], launch.arguments["s_width"]) if w]
    value = bound.bound(code, resources, gpu, launch.blocks, report["layout"], widths)
    if value is not None:
        report["bounds"][shape] = value._asdict()


def _multiplies(report: Report, gpu: Gpu) -> bool:
    """Whether tensor cores shall; IEEE products of fp32 are not for NVIDIA's."""
    ieee = report["dtype"] == "fp32" and gpu.kind == "cuda"
    return report["projects"] and report["kernel"] in PROJECTING and not ieee


def _faults(report: Report, gpu: Gpu) -> Iterator[str]:
    if report["spilled"]:
        yield f"{report['spilled']:,} bytes of a thread in memory"
    if local := report["instructions"].get("local"):
        yield f"{local} instructions to local memory"
    if _multiplies(report, gpu) and not report["loops"]:
        yield f"no loop with {gpu.mma[0]}"


# ---- text ----------------------------------------------------------------------------------------

COLUMNS = "{:7} {:5} {:16} {:10} {:6} {:18} {:>9} {:>7} {:>8} {:>8} {:>7} {:>7} {:>6}"
HEADER = COLUMNS.format(
    "target", "type", "divergence", "variant", "logits", "kernel", "registers", "spilled",
    "shared", "programs", "mma", "special", "bound",
)  # fmt: skip


def line(report: Report) -> str:
    """`mma`: tensor-core instructions in each loop over the width."""
    bounds = [value["use"] for value in report["bounds"].values()]
    return COLUMNS.format(
        report["target"],
        report["dtype"],
        report["divergence"],
        report["variant"],
        "made" if report["projects"] else "read",
        report["kernel"],
        report["registers"],
        report["spilled"],
        report["shared"],
        report["programs"],
        "+".join(str(loop["mma"]) for loop in report["loops"]),
        report["instructions"].get("special", 0),
        f"{min(bounds):.0%}" if bounds else "",
    ) + "".join(f"\n    {reason}" for reason in report["wrong"])


def table(found: list[Report]) -> str:
    """Markdown: a line for each target and type, and the bounds of the forward kernel."""
    lines = _head(
        "target", "type", "kernels", "wrong", "registers", "shared memory", "programs",
        "mma in a loop",
    )  # fmt: skip
    targets = [target for target in GPUS if any(r["target"] == target for r in found)]
    for target in targets:
        for dtype in DTYPES:
            own = [r for r in found if (r["target"], r["dtype"]) == (target, dtype)]
            if not own:
                continue
            made = [r for r in own if r["projects"] and r["kernel"] in PROJECTING]
            counts = {loop["mma"] for r in made for loop in r["loops"]}
            cells = (
                target,
                dtype,
                len(own),
                sum(bool(r["wrong"]) for r in own),
                max(r["registers"] for r in own),
                f"{max(r['shared'] for r in own) / 1024:.0f} of {GPUS[target].shared // 1024} KB",
                _range({r["programs"] for r in made}),
                f"{_range(counts)} {GPUS[target].mma[0]}" if counts else "",
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *_head("bound, bf16", *targets)]
    for shape in SHAPES:
        bounds = [_forward(found, target, shape) for target in targets]
        lines.append(f"| {shape} | " + " | ".join(bounds) + " |")
    return "\n".join(lines)


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _range(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _forward(found: list[Report], target: str, shape: str) -> str:
    """The bound of the plain forward kernel of forward KL."""
    wanted = (target, "bf16", "forward_kl", "plain", "statistics", True)
    names = ("target", "dtype", "divergence", "variant", "kernel", "projects")
    for report in found:
        if tuple(report[n] for n in names) == wanted and shape in report["bounds"]:
            return f"{report['bounds'][shape]['use']:.0%}"
    return ""
