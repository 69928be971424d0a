"""The public functions under torch.compile: an operator for scalars and one for per-row values.

While dynamo traces, a public function hands its arguments to an operator that runs the very same
function later, on real tensors: nothing of it is traced, and all its checks still speak. A scalar's
gradients are made with it, as ever, and scaled in the backward graph; per-row values are made again
in the backward pass (one forward pass more than without torch.compile).
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dudi_kernels.head import LMHead, LoRA

Tensors = list[torch.Tensor]

HEAD_PARTS = 4  # weight, bias, A and B of an LMHead, in the flat list of tensors


def function(name: str) -> Callable[..., Any]:
    import dudi_kernels

    return getattr(dudi_kernels, name)


# ---- arguments as a flat list of tensors and a string --------------------------------------------

Places = dict[str, tuple[str, Any]]  # argument -> ("head" | "tensor" | "value", where or what)


def _flatten(arguments: dict[str, Any]) -> tuple[Tensors, Places]:
    """Tensors in order, where they belong, and what the rest is. Dynamo traces this."""
    tensors: Tensors = []
    places: Places = {}
    for name, value in arguments.items():
        if isinstance(value, LMHead):
            a, b, scaling = None, None, 1.0
            if value.lora is not None:
                a, b, scaling = value.lora.a, value.lora.b, value.lora.scaling
            where = []
            for tensor in (value.weight, value.bias, a, b):
                where.append(-1 if tensor is None else len(tensors))
                if tensor is not None:
                    tensors.append(tensor)
            places[name] = ("head", (*where, value.softcap, value.scale, scaling))
        elif isinstance(value, Tensor):
            places[name] = ("tensor", len(tensors))
            tensors.append(value)
        else:
            places[name] = ("value", value)
    return tensors, places


def _write(places: Places) -> str:
    """One line an argument: dynamo can't trace a JSON encoder."""
    return "\n".join([f"{name} {kind} {what!r}" for name, (kind, what) in places.items()])


def _read(text: str) -> Places:
    found: Places = {}
    for line in text.split("\n"):
        name, kind, what = line.split(" ", 2)
        found[name] = (kind, ast.literal_eval(what))
    return found


def _restore(tensors: Sequence[Tensor], text: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, (kind, what) in _read(text).items():
        match kind:
            case "head":
                *where, softcap, scale, scaling = what
                weight, bias, a, b = (None if i < 0 else tensors[i] for i in where)
                assert weight is not None
                lora = None if a is None or b is None else LoRA(a, b, scaling)
                arguments[name] = LMHead(weight, bias, softcap, scale, lora)
            case "tensor":
                arguments[name] = tensors[what]
            case _:
                arguments[name] = what
    return arguments


def _run(name: str, tensors: Sequence[Tensor], text: str) -> list[Tensor]:
    result = function(name)(**_restore(tensors, text))
    return [result] if isinstance(result, Tensor) else list(result)


def _apart(work: Callable[[], list[Tensor]], device: torch.device) -> list[Tensor]:
    """Run in a thread of its own: torch switches autograd off for a thread inside an operator, and
    has no public way to switch it on again."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> list[Tensor]:
        with torch.enable_grad(), torch.cuda.stream(stream):
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


def _shapes(name: str, tensors: Sequence[Tensor], text: str) -> list[tuple[int, ...]]:
    """Of the results, from shapes alone."""
    places = _read(text)

    def value(key: str) -> Any:
        return places[key][1] if key in places else None

    hidden = tensors[0]
    rows = tuple(hidden.shape[:-1])
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
            pairs = value("num_pairs")
            return [*[()] * 5, (pairs,), (2 * pairs,), (2 * pairs,), *[rows] * 4, (), ()]
        case _:
            return [rows]


# ---- scalars -------------------------------------------------------------------------------------


@torch.library.custom_op("dudi_kernels::scalar", mutates_args=())
def scalar(tensors: Sequence[Tensor], name: str, text: str, needs: Sequence[bool]) -> list[Tensor]:
    """The results of a scalar loss, then the gradients that are wanted."""

    def work() -> list[Tensor]:
        inputs = _leaves(tensors, needs)
        results = _run(name, inputs, text)
        wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        grads = torch.autograd.grad(results[0], wanted) if wanted else ()
        return [r.detach().clone() for r in results] + [g.contiguous() for g in grads]

    return _apart(work, _device(tensors))


@scalar.register_fake
def _(tensors, name, text, needs):
    results = [
        tensors[0].new_empty(shape, dtype=torch.float32) for shape in _shapes(name, tensors, text)
    ]
    return results + _new_gradients(tensors, needs)


def _scalar_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    *_, needs = inputs
    count = sum(needs)
    ctx.needs, ctx.results = needs, len(output) - count
    ctx.save_for_backward(*output[len(output) - count :])
    ctx.mark_non_differentiable(*output[1:])


def _scalar_backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    saved = iter(ctx.saved_tensors)
    first = grads[0]
    scaled: list[Tensor | None] = []
    for needed in ctx.needs:
        own = next(saved) if needed else None
        scaled.append(None if own is None or first is None else (own * first).to(own.dtype))
    return scaled, None, None, None


scalar.register_autograd(_scalar_backward, setup_context=_scalar_context)


# ---- per-row values ------------------------------------------------------------------------------


@torch.library.custom_op("dudi_kernels::rows", mutates_args=())
def rows(tensors: Sequence[Tensor], name: str, text: str, needs: Sequence[bool]) -> list[Tensor]:
    with torch.no_grad():
        return [r.clone() for r in _run(name, tensors, text)]


@rows.register_fake
def _(tensors, name, text, needs):
    shapes = _shapes(name, tensors, text)
    return [tensors[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


@torch.library.custom_op("dudi_kernels::rows_backward", mutates_args=())
def rows_backward(
    grads: Sequence[Tensor],
    there: Sequence[bool],  # for which of the results
    tensors: Sequence[Tensor],
    name: str,
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are wanted."""

    def work() -> list[Tensor]:
        inputs = _leaves(tensors, needs)
        results = _run(name, inputs, text)
        own = [result for result, given in zip(results, there, strict=True) if given]
        pairs = [(r, g) for r, g in zip(own, grads, strict=True) if r.requires_grad]
        wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        outputs, seeds = zip(*pairs, strict=True)
        return [g.contiguous() for g in torch.autograd.grad(outputs, wanted, seeds)]

    return _apart(work, _device(tensors))


@rows_backward.register_fake
def _(grads, there, tensors, name, text, needs):
    return _new_gradients(tensors, needs)


def _rows_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    tensors, ctx.name, ctx.text, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    there = [g is not None for g in grads]
    seeds = [g for g in grads if g is not None]
    made = iter(rows_backward(seeds, there, ctx.saved_tensors, ctx.name, ctx.text, ctx.needs))
    return [next(made) if needed else None for needed in ctx.needs], None, None, None


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
    tensors, places = _flatten(arguments)
    enabled = torch.is_grad_enabled()
    needs = [False] * len(tensors)
    for key in trained:
        kind, what = places[key]
        for i in what[:HEAD_PARTS] if kind == "head" else (what,):
            if i >= 0:
                needs[i] = enabled and tensors[i].requires_grad
    return operator(tensors, name, _write(places), needs)
