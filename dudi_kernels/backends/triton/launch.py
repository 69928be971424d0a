"""From tensors to launches: arguments, grids and block sizes of the kernels.

`Launcher` is the one place where a kernel's arguments are put together; what is compiled ahead of
time (dudi_kernels/aot/) comes from its calls as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dudi_kernels.backends.triton import kernels, tune
from dudi_kernels.backends.triton.elements import INTERPRETED
from dudi_kernels.devices import GPUS, guard
from dudi_kernels.divergences import Helpers, Measure
from dudi_kernels.reach import REACH
from dudi_kernels.sweep import Side
from dudi_kernels.tiles import RowState, Setting, smooth_mask

OLDEST = 80  # compute capability of NVIDIA's GPUs: Triton has no tensor cores before
COMBINE_ROWS = 64
WAVES = 4  # programs for each multiprocessor, where rows alone are too few
INTERPRETED_UNITS = 1  # the interpreter's "multiprocessors": some splits at small shapes
MAX_SPLITS = 1024
HALF_BALANCE = 150  # FLOPs in the time of a byte, of GPUs since A100: 153 to 295
L2_BALANCE = {8: 64, 9: 73}  # of A100 and H100, whose L2 feeds the tiles (aot/roofline.py)
FP32_BALANCE = 10  # without tensor cores: 10 to 20


class Blocks(NamedTuple):
    """Block sizes and how a kernel is compiled."""

    rows: int
    columns: int
    width: int  # of the GEMMs; unused where logits are read
    warps: int
    stages: int


class Launch(NamedTuple):
    """A kernel, ready to run; it writes to its argument `partials` or `out` and nowhere else."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Source(NamedTuple):
    """Where a side's logits come from: a buffer, or its hidden states and head."""

    softcap: float | None  # the gradient goes through them in both cases
    scale: float
    logits: Tensor | None = None  # (R, V) fp32
    side: Side | None = None

    @classmethod
    def of(cls, side: Side) -> Source:
        return cls(side.head.softcap, side.head.scale, side=side)

    @property
    def operands(self) -> list[Tensor]:
        """The matrices that kernels load."""
        if self.side is None:
            return [] if self.logits is None else [self.logits]
        return [self.side.hidden, self.side.head.weight]


class Sides(NamedTuple):
    student: Source
    teacher: Source | None

    @property
    def fused(self) -> bool:
        return self.student.logits is None

    @property
    def device(self) -> torch.device:
        found = self.student.logits
        if found is None:
            assert self.student.side is not None
            found = self.student.side.hidden
        return found.device

    @property
    def dtype(self) -> torch.dtype:
        """The wider of both sides' hidden states: blocks have to fit either product."""
        sides = [source.side for source in self if source is not None and source.side is not None]
        return functools.reduce(torch.promote_types, (side.hidden.dtype for side in sides))

    @property
    def aligned(self) -> bool:
        """Whether all that kernels load can be loaded 16 bytes at once."""
        return all(_aligned(t) for source in self if source is not None for t in source.operands)


# ---- choices -------------------------------------------------------------------------------------


def read_blocks(target: Target, aligned: bool) -> Blocks:
    """For kernels that read logits: one row, a piece of it, 8 logits a thread, or 4."""
    if INTERPRETED:
        return Blocks(64, 1024, 16, 4, 1)
    return Blocks(1, 4096 if aligned else 2048, 16, target.warps(512), 2)


def fused_blocks(target: Target, dtype: torch.dtype, load: int = 0, aligned: bool = True) -> Blocks:
    """For kernels that project: as large as registers hold without spills (aot tells). `load`, 0
    to 5, is how much there is beside both sides' tiles; 4 and 5 have the same rows and columns."""
    if INTERPRETED:
        return Blocks(32, 1024, 64, 4, 1)
    if dtype == torch.float32:
        return _wide_blocks(target, load)
    if target.kind == "hip":
        return Blocks(128, (64, 64, 64, 32, 32, 32)[load], 64, 4, 2)
    if target.kind != "cuda":
        return Blocks(64, 64, 64, 4, 2)
    match target.capability // 10:
        case 8:
            width, stages = (64, 3) if load == 5 else (32, 4)
            return Blocks(128, (64, 64, 32, 32, 32, 32)[load], width, 8, stages)
        case 9:
            return Blocks(128, (128, 64, 64, 64, 32, 32)[load], 64 if aligned else 32, 8, 4)
        case 10:
            return Blocks(128, (128, 64, 64, 32, 32, 32)[load], 64 if aligned else 16, 8, 4)
        case _:
            columns, warps = (64, 64, 64, 32, 32, 32)[load], 4 if load == 5 else 8
            return Blocks(128, columns, 64 if aligned else 32, warps, 2)


def _wide_blocks(target: Target, load: int) -> Blocks:
    """Of fp32, of which a register holds half as much."""
    columns = (64, 64, 64, 64, 32, 32)[load]
    if target.kind == "hip":
        return Blocks(64, columns, 16, 8 if load < 4 else 4, 2)
    return Blocks(64, columns, 16, 8, 3 if target.capability >= 100 else 2)


class Target(NamedTuple):
    """What choices depend on."""

    kind: str  # "cuda", "hip", "xpu", or "interpreter"
    capability: int  # 90 for 9.0; 0 where there is none
    units: int  # multiprocessors

    def warps(self, threads: int) -> int:
        return threads // (64 if self.kind == "hip" else 32)


PLANNED = Target("cuda", 90, 132)  # what a plan takes a GPU for that isn't there: an H100


@functools.lru_cache(maxsize=16)
def target_of(device: torch.device) -> Target:
    if INTERPRETED:
        return Target("interpreter", 0, INTERPRETED_UNITS)
    if device.type == "xpu":
        return Target("xpu", 0, int(torch.xpu.get_device_properties(device).gpu_subslice_count))
    count = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip is not None:
        return Target("hip", 0, count)
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor, count)


def run(device: torch.device, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel on the current stream of a device; every launch goes through here."""
    with guard(device):
        kernel[grid](**arguments)


def wants_descriptors(target: Target) -> bool:
    """Whether the target loads tiles by descriptors (TMA)."""
    return target.kind == "cuda" and target.capability >= 90


def splits(row_blocks: int, tiles: int, count: int) -> tuple[int, int]:
    """Into how many parts the vocabulary is split, and the tiles of each."""
    wanted = min(MAX_SPLITS, tiles, max(1, WAVES * count // max(row_blocks, 1)))
    each = -(-tiles // wanted)
    return -(-tiles // each), each


def planned(device: torch.device) -> Target:
    """Of a device, or of one that a plan is made for."""
    absent = device.type in GPUS and not torch.get_device_module(device).is_available()
    return PLANNED if absent else target_of(device)


def flops_per_byte(target: Target, dtype: torch.dtype) -> float:
    """FLOPs of fused projections that take as long as a byte that *retain* moves."""
    if dtype == torch.float32:
        return FP32_BALANCE
    return L2_BALANCE.get(target.capability // 10, HALF_BALANCE)


def partial_bytes(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> int:
    """What the splits of `statistics` write where it projects, with the default blocks."""
    target = planned(device)
    blocks = fused_blocks(target, dtype, False)
    count, _ = splits(-(-rows // blocks.rows), -(-columns // blocks.columns), target.units)
    return kernels.STATISTICS_FIELDS * count * rows * 4


@functools.lru_cache(maxsize=64)
def jitted(terms: Callable[..., Any]) -> Any:
    """A divergence as kernels take it; the interpreter calls it as it is."""
    return terms if INTERPRETED else triton.jit(terms)


def precision(target: Target, dtype: torch.dtype) -> str:
    """Of fp32 products, as torch was told; products of half precision are exact in any case, and
    with them a LoRA's low rank, which is fp32, stays on the tensor cores."""
    if target.kind == "hip":
        return "ieee"  # has tensor cores for it, and nothing in between
    if dtype != torch.float32:
        return "tf32x3"
    by_name = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
    return by_name[torch.get_float32_matmul_precision()]


# ---- arguments -----------------------------------------------------------------------------------


def _source_arguments(letter: str, source: Source | None) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(("logits", "hidden", "weight", "bias", "low", "lora"))
    values |= dict.fromkeys(
        ("logits_stride", "hidden_stride", "weight_stride", "lora_stride", "width", "rank"), 0
    )
    values |= {"softcap": 1.0, "scale": 1.0}
    if source is not None:
        values |= {"softcap": source.softcap or 1.0, "scale": source.scale}
        if source.logits is not None:
            values |= {"logits": source.logits, "logits_stride": source.logits.stride(0)}
        else:
            assert source.side is not None
            values |= _projected(source.side)
    return {f"{letter}_{name}": value for name, value in values.items()}


def _projected(side: Side) -> dict[str, Any]:
    head, hidden = side.head, side.hidden.contiguous()
    weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
    found: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "bias": None if head.bias is None else head.bias.contiguous(),
        "hidden_stride": hidden.stride(0),
        "weight_stride": weight.stride(0),
        "width": hidden.shape[1],
    }
    if head.lora is not None and side.low is not None:
        b = head.lora.b.contiguous()
        low = side.low.contiguous()
        found |= {"low": low, "lora": b, "lora_stride": b.stride(0), "rank": low.shape[1]}
    return found


def _describe(arguments: dict[str, Any], blocks: Blocks) -> None:
    """Tensor descriptors (TMA) in place of hidden states and weights, if all of them allow it."""
    names = [f"{letter}_{name}" for letter in "st" for name in ("hidden", "weight")]
    tensors = {name: arguments[name] for name in names if arguments[name] is not None}
    if not all(map(_describable, tensors.values())):
        return
    for name, tensor in tensors.items():
        rows = blocks.rows if name.endswith("hidden") else blocks.columns
        shape = [rows, blocks.width]
        arguments[name] = TensorDescriptor.from_tensor(tensor, shape)
    arguments["DESCRIPTORS"] = True


def _aligned(matrix: Tensor) -> bool:
    """Whether rows begin where 16 bytes can be loaded at once, and any part's rows as well; a
    matrix whose rows are not in one piece is copied."""
    starts = [matrix.shape[1] * matrix.element_size()]
    if matrix.stride(1) == 1:
        starts += [matrix.stride(0) * matrix.element_size(), matrix.data_ptr()]
    return all(start % 16 == 0 for start in starts)


def _describable(tensor: Tensor) -> bool:
    aligned = tensor.stride(0) * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return aligned and tensor.numel() > 0


def _flags(sides: Sides, setting: Setting, target: Target) -> dict[str, Any]:
    found: dict[str, Any] = {
        "MASKED": setting.masked,
        "S_TEMPERED": setting.inv_tau != 1.0,
        "T_TEMPERED": setting.teacher_inv_tau != 1.0,
        "FUSED": sides.fused,
        "DESCRIPTORS": False,
        "PRECISION": "ieee",
    }
    for letter, source in zip("ST", sides, strict=True):
        head = None if source is None or source.side is None else source.side.head
        found |= {
            f"{letter}_BIAS": head is not None and head.bias is not None,
            f"{letter}_LORA": head is not None and head.lora is not None,
            f"{letter}_SOFTCAP": source is not None and source.softcap is not None,
        }
    if sides.fused:
        found["PRECISION"] = precision(target, sides.dtype)
    return found


class Launcher:
    """The kernels over the rows [first_row, first_row + rows) of a state."""

    def __init__(
        self,
        setting: Setting,
        state: RowState,
        sides: Sides,
        rows: int,
        columns: int,
        *,
        first_row: int = 0,
        first_column: int = 0,
    ):
        self.setting, self.state, self.sides = setting, state, sides
        self.rows, self.columns = rows, columns
        self.first_row, self.first_column = first_row, first_column
        self.target = target_of(sides.device)

    # ---- parts of the arguments ------------------------------------------------------------------

    def _blocks(
        self, kernel: Any, measure: Measure | None = None, skipping: bool = False
    ) -> Blocks:
        """With the same rows and columns for all kernels where tiles are skipped."""
        aligned = self.sides.aligned
        if not self.sides.fused:
            return read_blocks(self.target, aligned)
        load = 4 if not aligned else self._load(kernel, measure, skipping)
        return fused_blocks(self.target, self.sides.dtype, load, aligned)

    def _load(self, kernel: Any, measure: Measure | None, skipping: bool) -> int:
        """How much a kernel holds beside both sides' tiles, 0 to 5 (`fused_blocks`)."""
        setting = self.setting
        heads = [source.side.head for source in self.sides if source is not None and source.side]
        tempered = (setting.inv_tau, setting.teacher_inv_tau) != (1.0, 1.0)
        capped = any(head.softcap is not None for head in heads)
        more, most = tempered or capped, setting.masked and tempered and capped
        helpers = Helpers.NONE if measure is None else measure.helpers
        adaptive = measure is not None and measure.adaptive
        if any(head.lora is not None for head in heads):
            return 4  # a product more
        if kernel is kernels.sums:
            return (4 if most or helpers is Helpers.POWERS else 3) if setting.masked else 2
        if most and kernel is kernels.gradient:
            return 5
        if skipping:
            return 4 if most else 3
        if kernel is kernels.statistics:
            return 3 if most else 2 if setting.masked or more else 0
        if setting.masked or adaptive or (more and helpers is not Helpers.NONE):
            return 2
        return int(more or (measure is not None and measure.chain is None))

    def _tiles(self, blocks: Blocks) -> tuple[int, int]:
        """Blocks of rows, and of columns."""
        return -(-self.rows // blocks.rows), -(-self.columns // blocks.columns)

    def _common(self, teacher: bool, blocks: Blocks) -> dict[str, Any]:
        setting, target = self.setting, self.target
        found = {
            **_source_arguments("s", self.sides.student),
            **_source_arguments("t", self.sides.teacher if teacher else None),
            **_flags(self.sides if teacher else self.sides._replace(teacher=None), setting, target),
            "rows": self.rows,
            "first_row": self.first_row,
            "columns": self.columns,
            "s_inv_tau": setting.inv_tau,
            "t_inv_tau": setting.teacher_inv_tau,
            "BLOCK_N": blocks.rows,
            "BLOCK_V": blocks.columns,
            "BLOCK_D": blocks.width,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
        if self.sides.fused and wants_descriptors(target):
            _describe(found, blocks)
        return found

    def _log_sums(self) -> dict[str, Any]:
        state = self.state
        return {
            "s_log_sum": state.log_sum,
            "s_tempered_log_sum": state.tempered_log_sum,
            "t_log_sum": state.teacher_log_sum,
            "t_tempered_log_sum": state.teacher_tempered_log_sum,
        }

    def _measure(self, measure: Measure | None) -> dict[str, Any]:
        return {
            "TERMS": None if measure is None else jitted(measure.terms),
            "HELPERS": 0 if measure is None else measure.helpers.value,
            "MIXTURE": measure is not None and measure.adaptive,
            "mixture": self.state.mixture,
            "a": 0.0 if measure is None else measure.a,
            "b": 0.0 if measure is None else measure.b,
        }

    def _run(self, made: Callable[[Blocks], Launch], default: Blocks, free: bool = True) -> Launch:
        """With the default blocks, or tuned ones where they are free and the user asked for it."""
        found, launch = made(default), functools.partial(run, self.sides.device)
        if free and tune.wanted(self.sides.device):
            found = tune.fastest(found, made, default, self.target, launch)
        launch(found.kernel, found.grid, **found.arguments)
        return found

    def _sweep(
        self,
        kernel: Any,
        fields: int,
        teacher: bool,
        default: Blocks,
        free: bool = True,  # whether other blocks do as well
        **arguments: Any,
    ) -> Tensor:
        """The partial results (fields, splits, rows) of a kernel that walks the vocabulary."""

        def made(blocks: Blocks) -> Launch:
            row_blocks, tiles = self._tiles(blocks)
            count, each = splits(row_blocks, tiles, self.target.units)
            partials = torch.empty(fields, count, self.rows, device=self.state.weight.device)
            own = self._common(teacher, blocks) | {"partials": partials, "tiles": each}
            return Launch(kernel, (row_blocks, count), own | arguments)

        return self._run(made, default, free).arguments["partials"]

    def _combine(self, kernel: Any, partials: Tensor, **arguments: Any) -> None:
        """Partial results into the state."""
        state = self.state
        run(
            self.sides.device,
            kernel,
            (-(-self.rows // COMBINE_ROWS),),
            **arguments,
            partials=partials,
            divergence=state.divergence,
            g_sum=state.g_sum,
            poles=state.poles,
            t_entropy=state.teacher_entropy,
            rows=self.rows,
            first_row=self.first_row,
            splits=partials.shape[1],
            MASKED=self.setting.masked,
            BLOCK=COMBINE_ROWS,
            num_warps=4,
        )

    # ---- kernels ---------------------------------------------------------------------------------

    def statistics(
        self,
        student: bool,
        teacher: bool,
        measure: Measure | None,
        moments: bool,
        masses: Tensor | None = None,  # (MASS_FIELDS, T, R) to fill
    ) -> None:
        """Log-sum-exps and target logits of the wanted sides; with `moments`, of whole rows,
        entropies too and the divergence where it has a chain."""
        state, targets = self.state, self.setting.targets
        chain = measure.chain if moments and measure is not None else None
        shared = {
            "STUDENT": student,
            "TEACHER": teacher,
            "CHAIN": 0 if chain is None else 1 if chain.teacher_first else 2,
            "TARGETS": targets is not None,
        }
        partials = self._sweep(
            kernels.statistics,
            kernels.STATISTICS_FIELDS,
            teacher,
            self._blocks(kernels.statistics, skipping=masses is not None),
            masses is None,
            **shared,
            targets=targets,
            masses=masses,
            MASSES=masses is not None,
            GAPS=masses is not None and measure is not None and REACH[measure.terms].ratio,
        )
        self._combine(
            kernels.combine_statistics,
            partials,
            **self._log_sums(),
            **shared,
            s_target=state.target,
            s_entropy=state.entropy,
            t_target=state.teacher_target,
            MOMENTS=moments,
            S_TEMPERED=self.setting.inv_tau != 1.0,
            T_TEMPERED=self.setting.teacher_inv_tau != 1.0,
            OFFSET=0.0 if chain is None else chain.offset,
            SLOPE=0.0 if chain is None else chain.slope,
        )

    def sums(self, measure: Measure | None) -> None:
        """Divergence, sum of g and entropies, added to the state."""
        partials = self._sweep(
            kernels.sums,
            kernels.SUMS_FIELDS,
            measure is not None,
            self._blocks(kernels.sums, measure),
            **self._log_sums(),
            **self._measure(measure),
        )
        self._combine(
            kernels.combine_sums,
            partials,
            s_entropy=self.state.entropy,
            TAUGHT=measure is not None,
        )

    def tile(self) -> tuple[int, int]:
        """Rows and columns of the tiles that have a mass, and may be live."""
        return self._blocks(kernels.statistics, skipping=True)[:2]

    def gradient(self, measure: Measure | None, out: Tensor, live: Tensor | None = None) -> None:
        """Of the raw logits, into `out` (R, B); of tiles (blocks of rows, T) that are live."""
        state, targets = self.state, self.setting.targets
        arguments = dict(
            **self._log_sums(),
            **self._measure(measure),
            SMOOTH_MASK=0 if measure is None else smooth_mask(measure),
            targets=targets,
            target_logits=state.target,
            g_sums=state.g_sum,
            entropies=state.entropy,
            poles=state.poles,
            weights=state.weight,
            coefficients=state.coefficient,
            entropy_weights=state.entropy_weight,
            COEFFICIENT=state.coefficient is not None,
            ENTROPY_WEIGHT=state.entropy_weight is not None,
            TARGETS=targets is not None,
            live=live,
            live_stride=0 if live is None else live.stride(0),
            SKIP=live is not None,
            out=out,
            out_stride=out.stride(0),
            first_column=self.first_column,
        )

        def made(blocks: Blocks) -> Launch:
            common = self._common(measure is not None, blocks)
            return Launch(kernels.gradient, self._tiles(blocks), common | arguments)

        self._run(made, self._blocks(kernels.gradient, measure, live is not None), live is None)
