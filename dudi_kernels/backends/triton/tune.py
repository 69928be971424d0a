"""Blocks by timing: off unless DUDI_AUTOTUNE=1, since what is timed differs from run to run.

The candidates of a launch are its default blocks and their neighbours that fit the target. They are
timed on the real inputs the first time that a key comes up, with outputs of their own, so that
nothing is disturbed. The fastest is kept in memory and in `autotune.json`, in $DUDI_CACHE_DIR or
`dudi` in the XDG cache folder; another process takes it from there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from dudi_kernels import devices, divergences
from dudi_kernels.aot.targets import GPUS, KB

if TYPE_CHECKING:  # launch.py imports this module
    from dudi_kernels.backends.triton.launch import Blocks, Launch, Target

Run = Callable[..., None]  # (kernel, grid, **arguments)
Made = Callable[["Blocks"], "Launch"]

WARMUP, REPEAT = 10, 40  # milliseconds for each candidate
FORMAT = "dudi autotune 1"
SIZES = ("rows", "columns", "s_width", "t_width", "s_rank", "t_rank")
OPERANDS = ("s_hidden", "s_weight", "t_hidden", "t_weight", "out")
BLOCKS = ("BLOCK_N", "BLOCK_V", "BLOCK_D")
# Factors of rows, columns, width and warps, and what is added to the stages.
MOVES = (
    (2, 1, 1, 1, 0),
    (0.5, 1, 1, 1, 0),
    (1, 2, 1, 1, 0),
    (1, 0.5, 1, 1, 0),
    (2, 0.5, 1, 1, 0),
    (0.5, 2, 1, 1, 0),
    (1, 1, 2, 1, 0),
    (1, 1, 0.5, 1, 0),
    (1, 1, 1, 2, 0),
    (1, 1, 1, 0.5, 0),
    (1, 1, 1, 1, 1),
    (1, 1, 1, 1, -1),
)
# What compilations for sm_90 told: these many tiles' fp32 logits and other registers do not spill.
TILES_ALIVE = 3
OTHER_REGISTERS = 48
LEAST_DOT = 16  # rows, columns and width of tl.dot
MOST_BOX = 256  # along a side of a descriptor's block
MOST_THREADS = 1024

known: dict[str, Blocks] = {}  # by key, of this process


def wanted(device: torch.device) -> bool:
    """Whether the user asked for it; nothing can be timed on meta tensors."""
    return os.environ.get("DUDI_AUTOTUNE") == "1" and device.type != "meta"


# ---- candidates ----------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Of a target."""

    shared: int  # bytes a program may have
    registers: int  # a thread may have
    file: int  # registers of a multiprocessor
    warp: int  # threads


def limits_of(target: Target) -> Limits | None:
    """The published ones, or the least of its maker's; None: the interpreter has none."""
    if target.kind == "interpreter":
        return None
    gpus = [gpu for gpu in GPUS.values() if gpu.kind == target.kind]
    gpus = [gpu for gpu in gpus if gpu.arch == target.capability] or gpus
    shared = min((gpu.shared for gpu in gpus), default=64 * KB)
    file = min((gpu.registers for gpu in gpus), default=64 * KB)
    per_thread, warp = (512, 64) if target.kind == "hip" else (255, 32)
    return Limits(shared, per_thread, file, warp)


def candidates(default: Blocks, limits: Limits | None, item_size: int, fused: bool) -> list[Blocks]:
    """The default first, and its neighbours that can be expected to fit."""
    found = [default]
    for rows, columns, width, warps, more in MOVES:
        blocks = default._replace(
            rows=int(default.rows * rows),
            columns=int(default.columns * columns),
            width=int(default.width * width),
            warps=int(default.warps * warps),
            stages=default.stages + more,
        )
        if not fused:
            blocks = blocks._replace(width=default.width)  # unused there
        if blocks not in found and _fits(blocks, limits, item_size, fused):
            found.append(blocks)
    return found


def _fits(blocks: Blocks, limits: Limits | None, item_size: int, fused: bool) -> bool:
    if min(blocks) < 1 or (fused and min(blocks[:3]) < LEAST_DOT):
        return False
    if limits is None:
        return True
    threads = blocks.warps * limits.warp
    registers = TILES_ALIVE * blocks.rows * blocks.columns / threads + OTHER_REGISTERS
    if threads > MOST_THREADS or registers > min(limits.registers, limits.file / threads):
        return False
    operands = blocks.stages * (blocks.rows + blocks.columns) * blocks.width * item_size
    return not fused or (max(blocks[:3]) <= MOST_BOX and operands <= limits.shared)


# ---- the choice ----------------------------------------------------------------------------------


def fastest(launch: Launch, made: Made, default: Blocks, target: Target, run: Run) -> Launch:
    """A launch as it is, or with the blocks that timing prefers to its default."""
    fused = launch.arguments["FUSED"]
    item_size = _item_size(launch) if fused else 4
    options = candidates(default, limits_of(target), item_size, fused)
    key = key_of(launch, target)
    blocks = known.get(key)
    if blocks is None:
        stored = _read(cache_file()).get(key)
        blocks = next((option for option in options if list(option) == stored), None)
    if blocks is None:
        if devices.capturing(_device(launch)):  # where timing would be an error
            return launch
        blocks = _time(options, made, run)
        if blocks is not None:
            _write(cache_file(), key, blocks)
    known[key] = blocks = blocks or default  # nothing ran: running the default will tell why
    return launch if blocks == default else made(blocks)


def key_of(launch: Launch, target: Target) -> str:
    """Device, versions, kernel, flags, dtypes, and sizes to a power of two."""
    arguments = launch.arguments
    found: dict[str, Any] = {
        "device": _device_name(_device(launch)),
        "target": f"{target.kind}{target.capability}",
        "triton": triton.__version__,
        "source": _source(),
        "kernel": launch.kernel.fn.__name__,
    }
    found |= {name: 1 << max(0, arguments[name] - 1).bit_length() for name in SIZES}
    found |= {
        name: str(_operand(arguments[name]).dtype).removeprefix("torch.")
        for name in OPERANDS
        if arguments.get(name) is not None
    }
    found |= {
        name: getattr(value, "__name__", value)
        for name, value in arguments.items()
        if name.isupper() and name not in BLOCKS
    }
    return " ".join(f"{name}={value}" for name, value in found.items())


def _time(options: list[Blocks], made: Made, run: Run) -> Blocks | None:
    """The fastest that compiles and runs; None: none does."""
    times: dict[Blocks, float] = {}
    for blocks in options:
        try:
            own = made(blocks)
            arguments = own.arguments | _scratch(own.arguments)
            times[blocks] = milliseconds(functools.partial(run, own.kernel, own.grid, **arguments))
        except Exception:  # a compiler's, or more shared memory than there is
            continue
    return min(times, key=lambda blocks: times[blocks]) if times else None


def milliseconds(function: Callable[[], None]) -> float:
    return triton.testing.do_bench(function, warmup=WARMUP, rep=REPEAT, return_mode="median")


def _scratch(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """In place of what is not a launch's own: *retain* writes over the logits that it reads."""
    out = arguments.get("out")
    if out is None:
        return {}
    return {"out": torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)}


def _item_size(launch: Launch) -> int:
    """Of the widest operand."""
    operands = (launch.arguments[name] for name in OPERANDS[:-1])
    return max(_operand(operand).element_size() for operand in operands if operand is not None)


def _device(launch: Launch) -> torch.device:
    found = launch.arguments["s_logits"]
    return (_operand(launch.arguments["s_hidden"]) if found is None else found).device


def _operand(value: Any) -> Tensor:
    """A tensor, or that of a descriptor."""
    return value if isinstance(value, Tensor) else value.base


@functools.lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return getattr(torch, device.type).get_device_name(device)


@functools.lru_cache(maxsize=1)
def _source() -> str:
    """Tells whether kernels, their launches or the divergences have changed."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(divergences.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# ---- on disk -------------------------------------------------------------------------------------


def cache_file() -> Path:
    folder = os.environ.get("DUDI_CACHE_DIR")
    if folder:
        return Path(folder) / "autotune.json"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "dudi" / "autotune.json"


def _read(file: Path) -> dict[str, Any]:
    """Choices by key; none where the file is missing or not ours."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] == FORMAT and isinstance(found["choices"], dict):
            return found["choices"]
        reason = "it has another format"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = repr(error)
    warnings.warn(f"{file} is ignored: {reason}", RuntimeWarning, stacklevel=2)
    return {}


def _write(file: Path, key: str, blocks: Blocks) -> None:
    """Beside what other processes have written; renamed, so that no reader sees half a file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        choices = _read(file) | {key: list(blocks)}
        part = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
        text = json.dumps({"format": FORMAT, "choices": choices}, indent=1)
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        warnings.warn(f"{file} can't be written: {error}", RuntimeWarning, stacklevel=2)
