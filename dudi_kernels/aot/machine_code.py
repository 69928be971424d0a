"""What compiled kernels are made of: resources, and instructions by class and loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

from dudi_kernels.aot.targets import Gpu

CLASSES = {  # by how a machine instruction begins, the first that fits
    "special": ("MUFU", "v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ds_"),
    "global": ("LDG", "STG", "LDGSTS", "UTMALDG", "LDTM", "STTM", "global_", "buffer_", "flat_"),
    "local": ("LDL", "STL", "scratch_"),
    "control": ("BRA", "BSYNC", "BSSY", "EXIT", "WARPSYNC", "BAR", "SYNCS", "s_", "RET", "CALL"),
}


class Resources(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of a thread that go to memory
    shared: int  # bytes of a program
    tensor_columns: int  # of a program, in tensor memory
    threads: int  # of a program


class Instruction(NamedTuple):
    address: int
    text: str  # without predicates
    jump: int | None  # where a branch goes


class Loop(NamedTuple):
    start: int  # addresses, both included
    stop: int


def resources(compiled: Any, gpu: Gpu) -> Resources:
    threads = compiled.metadata.num_warps * gpu.warp
    shared, columns = compiled.metadata.shared, tensor_columns(compiled)
    if gpu.kind == "hip":
        text = compiled.asm["amdgcn"]
        found = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)", text)}
        spilled = found["private_segment_fixed_size"]
        return Resources(found["vgpr_count"], spilled, shared, columns, threads)
    text = _tool("-res-usage", compiled.asm["cubin"])
    registers, stack, local = (
        max(map(int, re.findall(rf"{name}:(\d+)", text))) for name in ("REG", "STACK", "LOCAL")
    )
    return Resources(registers, stack + local, shared, columns, threads)


def tensor_columns(compiled: Any) -> int:
    return getattr(compiled.metadata, "tmem_size", 0) or 0


def layout(compiled: Any) -> tuple[int, int]:
    """How many warps share a tile's rows, and its columns, where each has its own product."""
    pattern = r"(?:nvidia_mma|amd_mfma)<\{.*?warpsPerCTA = \[(\d+), (\d+)\]"
    found = re.search(pattern, compiled.asm["ttgir"])
    return (int(found[1]), int(found[2])) if found else (1, 1)


def _tool(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run(
            [tool, option, file], capture_output=True, text=True, check=True
        ).stdout


def instructions(compiled: Any, gpu: Gpu) -> list[Instruction]:
    if gpu.kind == "hip":
        return _amd(compiled.asm["amdgcn"])
    return _nvidia(_tool("-sass", compiled.asm["cubin"]))


def _nvidia(text: str) -> list[Instruction]:
    found, ended = [], False
    for address, whole in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text):
        line = re.sub(r"^@!?U?P\w+\s+", "", whole.strip())
        ended = ended or whole.strip() == "EXIT"
        # what comes later is out of line: places to wait in, which jump back
        jump = re.search(r"0x([0-9a-f]+)", line) if re.match(r"U?BRA", line) else None
        to = int(jump[1], 16) if jump and not ended else None
        found.append(Instruction(int(address, 16), line, to))
    return found


def _amd(text: str) -> list[Instruction]:
    body = text[: text.index("s_endpgm")] if "s_endpgm" in text else text
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in body.splitlines():
        line = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"[a-z]\w+", line):
            lines.append(line)
    found = []
    for address, line in enumerate(lines):
        to = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        found.append(Instruction(address, line, labels.get(to[1]) if to else None))
    return found


def loops(code: list[Instruction]) -> list[Loop]:
    """By their backward branches, outer before inner."""
    found = {Loop(i.jump, i.address) for i in code if i.jump is not None and i.jump < i.address}
    return sorted(found, key=lambda loop: (loop.start, -loop.stop))


def inside(code: list[Instruction], loop: Loop) -> list[Instruction]:
    return [i for i in code if loop.start <= i.address <= loop.stop]


def is_mma(instruction: Instruction, gpu: Gpu) -> bool:
    return instruction.text.startswith(gpu.mma)


def by_class(code: list[Instruction], gpu: Gpu) -> Counter[str]:
    """How many of each class; "other" are arithmetic, moves and conversions."""
    counts: Counter[str] = Counter()
    for instruction in code:
        if is_mma(instruction, gpu):
            counts["mma"] += 1
            continue
        names = (n for n, begins in CLASSES.items() if instruction.text.startswith(begins))
        counts[next(names, "other")] += 1
    return counts
