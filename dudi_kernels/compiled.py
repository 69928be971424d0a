"""The public functions under torch.compile: an operator for scalars and one for per-row values.

While dynamo traces, a public function hands its arguments to an operator that runs the very same
function later, on real tensors and under the same autocast: nothing of it is traced, and all its
checks still speak. A scalar's gradients are made with it, as ever, and scaled in the backward
graph, in fp32; per-row values are made again in the backward pass (one forward pass more than
without torch.compile).
"""

from __future__ import annotations

import ast
import inspect
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from dudi_kernels.autograd import fp32_gradients
from dudi_kernels.devices import current_stream
from dudi_kernels.head import LMHead, LoRA
from dudi_kernels.shard import SHARDS, VocabularyShard
from dudi_kernels.topk import TopKTeacher
from dudi_kernels.verbalizer import VERBALIZERS, Verbalizer

Tensors = list[torch.Tensor]
Place = tuple[str, Any]  # where an argument is in the flat lists, or what it is

PARTS: dict[type, tuple[str, ...]] = {  # what is taken apart, in the order that rebuilds it
    LMHead: ("weight", "bias", "softcap", "scale", "lora", "shard"),
    LoRA: ("a", "b", "scaling"),
    TopKTeacher: ("ids", "log_probs"),
}
# The operator works in a thread of its own, whose memory inductor's CUDA graphs would not hold: it
# splits its graphs there.
TAGS = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]
KINDS = {kind.__name__: kind for kind in PARTS}


def function(name: str) -> Callable[..., Any]:
    import dudi_kernels

    return getattr(dudi_kernels, name)


# ---- arguments as flat lists of tensors and integers, and a string -------------------------------


class Flat(NamedTuple):
    """The arguments of a call. Dynamo traces what makes them of arguments."""

    tensors: Tensors
    sizes: list[int]
    places: dict[str, Place]

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Flat:
        tensors: Tensors = []
        sizes: list[int] = []
        places = {name: _place(value, tensors, sizes) for name, value in arguments.items()}
        return cls(tensors, sizes, places)

    @property
    def text(self) -> str:
        """One line an argument: dynamo can't trace a JSON encoder."""
        return "\n".join([f"{name} {place!r}" for name, place in self.places.items()])


def _place(value: Any, tensors: Tensors, sizes: list[int]) -> Place:
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor", len(tensors) - 1
    if isinstance(value, (LMHead, LoRA, TopKTeacher)):
        kind = type(value)
        parts = [_place(getattr(value, part), tensors, sizes) for part in PARTS[kind]]
        return kind.__name__, tuple(parts)
    if isinstance(value, VocabularyShard):  # a process group is no argument of an operator
        return "shard", value.key
    if isinstance(value, Verbalizer):  # its tables are made once, so the operator is told which
        return "verbalizer", value.key
    if not isinstance(value, (int, float)) or _constant(value):
        return "value", value
    # A number that changes from call to call: as a constant it would be compiled again for each
    # value, and so would a float that is an operator's argument.
    if isinstance(value, int):
        sizes.append(value)
        return "size", len(sizes) - 1
    tensors.append(torch.ones((), dtype=torch.float64, device="cpu") * value)
    return "number", len(tensors) - 1


def _constant(value: float) -> bool:
    return has_static_value(value) and math.isfinite(value)  # `inf` is no Python literal


def _read(text: str) -> dict[str, Place]:
    lines = (line.split(" ", 1) for line in text.split("\n"))
    return {name: ast.literal_eval(place) for name, place in lines}


def _restored(place: Place, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Any:
    kind, what = place
    match kind:
        case "tensor":
            return tensors[what]
        case "number":
            return tensors[what].item()
        case "size":
            return sizes[what]
        case "value":
            return what
        case "shard":
            return SHARDS[what]
        case "verbalizer":
            return VERBALIZERS[what]
        case _:
            return KINDS[kind](*(_restored(part, tensors, sizes) for part in what))


def _tensors_of(place: Place) -> list[int]:
    """Where those are that gradients may be wanted for."""
    kind, what = place
    if kind == "tensor":
        return [what]
    return [i for part in what for i in _tensors_of(part)] if kind in KINDS else []


def _run(
    name: str,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    text: str,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    places = _read(text)
    given = {key: _restored(place, tensors, sizes) for key, place in places.items()}
    kind = _device(tensors).type
    with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
        result = function(name)(**given)
    return [result] if isinstance(result, Tensor) else list(result)


def _apart(work: Callable[[], list[Tensor]], device: torch.device) -> list[Tensor]:
    """Run in a thread of its own: torch switches autograd off for a thread inside an operator, and
    has no public way to switch it on again. A graph that is captured takes what any thread launches
    on its stream: those of autograd's backward pass do as well."""
    stream = current_stream(device)

    def run() -> list[Tensor]:
        with torch.enable_grad(), stream():
            return work()

    return _worker(os.getpid()).submit(run).result()


@lru_cache(maxsize=1)
def _worker(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="dudi-operator")


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device


def _leaves(tensors: Sequence[Tensor], needs: Sequence[bool]) -> Tensors:
    return [
        t.detach().requires_grad_() if needed else t
        for t, needed in zip(tensors, needs, strict=True)
    ]


def _new_gradients(tensors: Sequence[Tensor], needs: Sequence[bool]) -> Tensors:
    """Contiguous, whatever the strides of the tensors are."""
    return [t.new_empty(t.shape) for t, needed in zip(tensors, needs, strict=True) if needed]


def _shapes(
    name: str, tensors: Sequence[Tensor], sizes: Sequence[int], text: str
) -> list[tuple[int, ...]]:
    """Of the results, from shapes alone."""
    places = _read(text)

    def value(key: str) -> Any:
        return _restored(places[key], tensors, sizes) if key in places else None

    rows = tuple(tensors[0].shape[:-1])  # of the hidden states
    match name:
        case "linear_distill_loss":
            return [(), *[rows] * 4, (), ()]
        case "linear_distill":
            return [rows] * 4
        case "linear_cross_entropy":
            return [rows if value("reduction") == "none" else ()]
        case "sequence_log_prob":
            return [(value("num_segments"),)]
        case "linear_dudi_loss":
            pairs, samples = value("num_pairs"), value("num_generations") or 1
            sequences = (pairs // samples * (1 + samples),)
            return [*[()] * 5, (pairs,), sequences, sequences, *[rows] * 4, (), ()]
        case _:
            return [rows]


def _new_results(name: str, tensors: Sequence[Tensor], sizes: Sequence[int], text: str) -> Tensors:
    shapes = _shapes(name, tensors, sizes, text)
    return [tensors[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


def _no_gradients(others: Sequence[Any]) -> list[Any]:
    """Of arguments that are no tensors; torch takes an empty list for one of tensors."""
    return [[] if value == [] else None for value in others]


# ---- scalars -------------------------------------------------------------------------------------


@torch.library.custom_op("dudi_kernels::scalar", mutates_args=(), tags=TAGS)
def scalar(
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    name: str,
    text: str,
    autocast: torch.dtype | None,  # where it is on: what runs an operator switches it off
    needs: Sequence[bool],
) -> list[Tensor]:
    """The results of a scalar loss, then the gradients that are wanted, in fp32: a GradScaler's
    factor comes before they are rounded."""

    def work() -> list[Tensor]:
        inputs = [t.detach() for t in tensors]
        wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        with fp32_gradients(wanted) as leaves:
            results = _run(name, inputs, sizes, text, autocast)
        grads = torch.autograd.grad(results[0], leaves) if leaves else ()
        return [r.detach().clone() for r in results] + [g.contiguous() for g in grads]

    return _apart(work, _device(tensors))


@scalar.register_fake
def _(tensors, sizes, name, text, autocast, needs):
    grads = [t.float() for t in _new_gradients(tensors, needs)]
    return _new_results(name, tensors, sizes, text) + grads


def _scalar_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    tensors, *ctx.others = inputs  # the needs are the last
    ctx.dtypes = [t.dtype for t in tensors]
    ctx.save_for_backward(*output[len(output) - sum(ctx.others[-1]) :])
    ctx.mark_non_differentiable(*output[1:])


def _scalar_backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    saved = iter(ctx.saved_tensors)
    first = grads[0]
    scaled: list[Tensor | None] = []
    for needed, dtype in zip(ctx.others[-1], ctx.dtypes, strict=True):
        own = next(saved) if needed else None
        scaled.append(None if own is None or first is None else (own * first).to(dtype))
    return scaled, *_no_gradients(ctx.others)


scalar.register_autograd(_scalar_backward, setup_context=_scalar_context)


# ---- per-row values ------------------------------------------------------------------------------


@torch.library.custom_op("dudi_kernels::rows", mutates_args=(), tags=TAGS)
def rows(
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    name: str,
    text: str,
    autocast: torch.dtype | None,  # where it is on: what runs an operator switches it off
    needs: Sequence[bool],
) -> list[Tensor]:
    with torch.no_grad():
        return [r.clone() for r in _run(name, tensors, sizes, text, autocast)]


@rows.register_fake
def _(tensors, sizes, name, text, autocast, needs):
    return _new_results(name, tensors, sizes, text)


@torch.library.custom_op("dudi_kernels::rows_backward", mutates_args=(), tags=TAGS)
def rows_backward(
    grads: Sequence[Tensor],
    there: Sequence[bool],  # for which of the results
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    name: str,
    text: str,
    autocast: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are wanted."""

    def work() -> list[Tensor]:
        inputs = _leaves(tensors, needs)
        results = _run(name, inputs, sizes, text, autocast)
        own = [result for result, given in zip(results, there, strict=True) if given]
        pairs = [(r, g) for r, g in zip(own, grads, strict=True) if r.requires_grad]
        wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        outputs, seeds = zip(*pairs, strict=True)
        return [g.contiguous() for g in torch.autograd.grad(outputs, wanted, seeds)]

    return _apart(work, _device(tensors))


@rows_backward.register_fake
def _(grads, there, tensors, sizes, name, text, autocast, needs):
    return _new_gradients(tensors, needs)


def _rows_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    tensors, *ctx.others = inputs  # the needs are the last
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    there = [g is not None for g in grads]
    seeds = [g for g in grads if g is not None]
    made = iter(rows_backward(seeds, there, ctx.saved_tensors, *ctx.others))
    own = [next(made) if needed else None for needed in ctx.others[-1]]
    return own, *_no_gradients(ctx.others)


rows.register_autograd(_rows_backward, setup_context=_rows_context)


# ---- the way in ----------------------------------------------------------------------------------


P = ParamSpec("P")
R = TypeVar("R")


def traceable(
    *trained: str, result: type[tuple] | None = None, per_row: Callable[[dict], bool] | bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a public function be traced as one operator; gradients reach what `trained` names."""

    def decorate(plain: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(plain)

        @wraps(plain)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                return plain(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments  # hidden states are the first
            by_row = per_row if isinstance(per_row, bool) else per_row(arguments)
            results = _call(plain.__name__, arguments, trained, rows if by_row else scalar)
            if result is None:
                return results[0]
            return result(*results[: len(result._fields)])  # type: ignore

        return wrapper

    return decorate


def _call(name: str, arguments: dict[str, Any], trained: tuple[str, ...], operator: Any) -> Any:
    for count, wanted in (("num_pairs", "linear_dudi_loss"), ("num_segments", "sequence_log_prob")):
        if name == wanted and arguments.get(count) is None:
            raise ValueError(f"{count} must be given under torch.compile: shapes depend on it")
    flat = Flat.of(arguments)
    own = [i for key in trained for i in _tensors_of(flat.places[key])]
    enabled = torch.is_grad_enabled()
    needs = [enabled and i in own and tensor.requires_grad for i, tensor in enumerate(flat.tensors)]
    return operator(flat.tensors, flat.sizes, name, flat.text, _autocast(flat.tensors), needs)


def _autocast(tensors: Tensors) -> torch.dtype | None:
    kind = _device(tensors).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
