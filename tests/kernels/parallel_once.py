"""For test_vocabulary_parallel.py: one rank, which computes every case and writes down what it got.

`python parallel_once.py FOLDER` with RANK and WORLD_SIZE set. The same functions compute a case in
one process, with whole heads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Side, error, make_side, make_targets
from torch import Tensor

import dudi_kernels
from dudi_kernels import (
    LMHead,
    LoRA,
    TopKTeacher,
    Verbalizer,
    distributed_adaptive,
    linear_cross_entropy,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
)

ROWS, VOCAB, WIDTHS = 40, 101, (16, 24)
BUDGET = 8_000  # bytes: several chunks of rows, several blocks of columns
STREAMED = 300  # not a row of logits: kernels project in both passes
SEGMENTS = torch.tensor([0] * 11 + [1] * 7 + [2] * 4 + [3] * 18)  # pairs that fit a chunk and don't
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call of a public function, and what its heads are like."""

    name: str
    function: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = ROWS
    dtype: torch.dtype = torch.float32
    teacher: bool = True
    targets: bool = True
    ignored: int = 0  # rows
    bias: bool = False
    masked: tuple[str, ...] = ()  # sides of which the rows of the second rank are -inf
    softcap: float | None = None
    scale: float = 1.0
    lora: bool = False
    frozen: tuple[str, ...] = ()  # inputs that want no gradient
    uneven: bool = False
    uniform: bool = False  # a teacher whose tokens are all as likely
    distributed: bool = False  # DTensors
    budget: int = BUDGET


def slices(case: Case, world: int) -> list[slice]:
    """Rows of each rank; by default as a DTensor has them."""
    if case.uneven:
        sizes = {2: [90, 11], 4: [50, 1, 30, 20]}[world]
    else:
        sizes = [len(part) for part in torch.arange(VOCAB).chunk(world)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def cases() -> list[Case]:
    loss, rows, dudi = "linear_distill_loss", "linear_distill", "linear_dudi_loss"
    names = list(dudi_kernels.DIVERGENCES)
    tempered = {"temperature": 0.7, "teacher_temperature": 1.5}
    shaped: dict[str, Any] = {"bias": True, "softcap": 3.0, "scale": 1.5}
    both = ("student", "teacher")
    found = [Case(f"loss-{d}", loss, {"divergence": d, "ce_weight": 0.5}) for d in names]
    found += [Case(f"rows-{d}", rows, {"divergence": d, **tempered}) for d in names]
    for d in ("forward_kl", "jsd", "adaptive_kl"):
        own = {"divergence": d}
        found += [
            Case(f"loss-shaped-{d}", loss, {**own, **tempered, "ce_weight": 0.5}, **shaped),
            Case(f"rows-shaped-{d}", rows, own, **shaped),
            Case(f"loss-slice-masked-{d}", loss, {**own, "ce_weight": 0.5}, masked=both),
            Case(f"rows-slice-masked-{d}", rows, {**own, **tempered}, masked=both, softcap=3.0),
            Case(f"loss-uneven-{d}", loss, own, uneven=True, targets=False),
            Case(f"rows-uneven-{d}", rows, own, uneven=True, targets=False),
            Case(f"loss-bf16-{d}", loss, {**own, "ce_weight": 0.5}, dtype=torch.bfloat16),
            Case(f"rows-bf16-{d}", rows, own, dtype=torch.bfloat16),
            Case(f"loss-dtensor-{d}", loss, own, distributed=True, bias=True),
        ]
    for who, d in (("student", "forward_kl"), ("student", "jsd"), ("teacher", "reverse_kl")):
        found += [
            Case(f"loss-{who}-masked-{d}", loss, {"divergence": d}, masked=(who,)),
            Case(f"rows-{who}-masked-{d}", rows, {"divergence": d}, masked=(who,)),
        ]
    found += [
        Case("loss-equals", loss, {"divergence": "adaptive_kl"}, uniform=True),
        Case("rows-equals", rows, {"divergence": "adaptive_kl"}, uniform=True, uneven=True),
        Case("loss-empty", loss, rows=0),
        Case("rows-empty", rows, {"divergence": "jsd"}, rows=0),
        Case("loss-ignored", loss, {"ce_weight": 0.5}, ignored=7),
        Case("rows-ignored", rows, {"divergence": "jeffreys"}, ignored=7),
        Case("loss-lora", loss, {"ce_weight": 0.5}, lora=True),
        Case("rows-lora", rows, lora=True),
        Case("loss-frozen-hidden", loss, frozen=("hidden",)),
        Case("rows-frozen-head", rows, frozen=("weight",)),
        Case("loss-frozen", loss, frozen=("hidden", "weight")),
        Case("rows-dtensor", rows, distributed=True, bias=True),
        Case("dudi", dudi, {"ce_weight": 0.3, "preference_weight": 0.4}),
        Case("dudi-slice-masked", dudi, {"preference_weight": 0.4}, masked=both),
        Case("dudi-uneven", dudi, {"preference_weight": 0.4, "temperature": 2.0}, uneven=True),
        Case(
            "dudi-teacher",
            dudi,
            {"preference_weight": 0.4, "reference_log_prob": "teacher", "on_policy_weight": 0.0},
            bias=True,
        ),
        Case(
            "dudi-long-jsd",
            dudi,
            {"preference_weight": 0.4, "off_policy_divergence": "jsd"},
            budget=BUDGET // 2,
        ),
        Case(
            "dudi-samples",
            dudi,
            {
                "num_generations": 3,
                "preference_weight": 0.4,
                "preference_loss": "hinge",
                "divergence_weight": torch.linspace(0, 2, ROWS),
            },
        ),
        Case("dudi-adaptive", dudi, {"off_policy_divergence": "adaptive_kl", "ce_weight": 0.3}),
    ]
    alone: dict[str, Any] = {"teacher": False}
    for reduction in ("mean", "sum", "none"):
        own = {"reduction": reduction}
        found.append(Case(f"ce-{reduction}", "linear_cross_entropy", own, ignored=3, **alone))
    found += [
        Case("ce-bf16", "linear_cross_entropy", dtype=torch.bfloat16, **shaped, **alone),
        Case("log-prob", "linear_log_prob", {"temperature": 0.6}, ignored=3, **alone),
        Case("log-prob-masked", "linear_log_prob", masked=("student",), **alone),
        Case("sequence", "sequence_log_prob", uneven=True, **alone),
    ]
    triton = {"backend": "triton"}
    few: dict[str, Any] = {"rows": 6, "budget": 100_000}
    found += [
        Case("triton-loss", loss, {**triton, "ce_weight": 0.5}, **few),
        Case("triton-loss-jsd", loss, {**triton, "divergence": "jsd"}, uneven=True, **few),
        Case("triton-rows", rows, {**triton, **tempered}, masked=both, **few),
        Case("triton-rows-jsd", rows, {**triton, "divergence": "jsd"}, bias=True, **few),
        Case("triton-streamed", loss, {**triton, "ce_weight": 0.5}, rows=6, budget=STREAMED),
        Case("triton-streamed-dudi", dudi, {**triton, "preference_weight": 0.4}, budget=STREAMED),
        Case("triton-ce", "linear_cross_entropy", triton, **few, **alone),
        Case("triton-log-prob", "linear_log_prob", triton, uneven=True, **few, **alone),
    ]
    return found


class Problem:
    """The tensors of a case: the same on all ranks."""

    def __init__(self, case: Case, world: int):
        self.case, self.world = case, world
        bias = case.bias or bool(case.masked)
        shape = {"bias": bias, "softcap": case.softcap, "scale": case.scale}
        student, teacher = (
            make_side(case.rows, VOCAB, width, case.dtype, seed=seed, **shape)
            for seed, width in enumerate(WIDTHS)
        )
        self.sides = {"student": student, "teacher": teacher}
        second = slices(case, world)[1]
        with torch.no_grad():
            if case.uniform:
                teacher.weight.zero_()
            for who in case.masked:
                self.sides[who].bias[second] = -torch.inf
        self.targets = make_targets(case.rows, VOCAB)
        if case.masked:
            self.targets = torch.where(self.targets < second.start, self.targets, 0)
        self.targets[: case.ignored] = -100  # of linear_dudi_loss there are none
        random = torch.Generator().manual_seed(5)
        self.lora = None
        if case.lora:
            a, b = (torch.randn(*s, generator=random) for s in ((3, WIDTHS[0]), (VOCAB, 3)))
            self.lora = LoRA(a.requires_grad_(), b.requires_grad_(), 0.3)
        self.row_gradient = torch.randn(4, case.rows, generator=random)


def head_of(side: Side, lora: LoRA | None, own: slice | None, mesh: Any) -> tuple[LMHead, list]:
    """A head, whole or of one rank, and its leaves: weight, bias, B."""
    if own is None:
        leaves = [side.weight, side.bias, None if lora is None else lora.b]
        return LMHead(side.weight, side.bias, side.softcap, side.scale, lora), leaves

    def leaf(value: Tensor | None) -> Any:
        if value is None:
            return None
        if mesh is not None:
            from torch.distributed.tensor import Shard, distribute_tensor

            return distribute_tensor(value.detach(), mesh, [Shard(0)]).requires_grad_()
        return value.detach()[own].clone().requires_grad_()

    weight, bias = leaf(side.weight), leaf(side.bias)
    part = None if lora is None else LoRA(lora.a, leaf(lora.b), lora.scaling)
    group = None if mesh is not None else dist.group.WORLD
    head = LMHead.sharded(weight, bias, side.softcap, side.scale, part, group=group)
    return head, [weight, bias, None if part is None else part.b]


def compute(
    case: Case, world: int, rank: int | None = None, mesh: Any = None, function: Any = None
) -> Results:
    """Values and gradients, of one process or of a rank; of another function than the case's."""
    problem = Problem(case, world)
    own = None if rank is None else slices(case, world)[rank]
    mesh = mesh if case.distributed else None
    student, teacher = problem.sides["student"], problem.sides["teacher"]
    head, leaves = head_of(student, problem.lora, own, mesh)
    hidden = student.hidden.detach().clone().requires_grad_()
    inputs = dict(zip(("weight", "bias", "lora_b"), leaves, strict=True), hidden=hidden)
    if problem.lora is not None:
        inputs["lora_a"] = problem.lora.a
    for name in case.frozen:
        inputs[name].requires_grad_(False)
    sides: list[Any] = [hidden, head]
    if case.teacher:
        sides += [teacher.hidden.detach(), head_of(teacher, None, own, mesh)[0]]
    settings = dict(case.settings)
    if rank is not None:
        settings["memory_budget"] = case.budget if case.dtype == torch.float32 else 3 * case.budget
    function = function or getattr(dudi_kernels, case.function)
    results, loss = call(case, function, sides, problem, settings)
    if loss.requires_grad:
        loss.backward()
    for name, tensor in inputs.items():
        if tensor is not None and tensor.grad is not None:
            grad = tensor.grad
            results[f"grad {name}"] = grad.to_local() if hasattr(grad, "to_local") else grad
    return {name: value.detach() for name, value in results.items()}


def call(
    case: Case, function: Any, sides: list[Any], problem: Problem, settings: dict[str, Any]
) -> tuple[Results, Tensor]:
    """All results, and a scalar of those that have a gradient."""
    targets = (problem.targets,) if case.targets else ()
    if case.function == "sequence_log_prob":
        found = function(*sides, *targets, SEGMENTS[: case.rows], num_segments=4, **settings)
        return {"value": found}, (found * problem.row_gradient[0, :4]).sum()
    if case.function == "linear_dudi_loss":
        found = function(*sides, *targets, SEGMENTS, **settings)
        return found._asdict(), found.loss
    if case.function.startswith("linear_distill"):
        own = {"targets": problem.targets} if case.targets else {}
        found = function(*sides, **own, **settings)
        if case.function == "linear_distill_loss":
            return found._asdict(), found.loss
        rows = zip(found[:3], problem.row_gradient[:3], strict=True)
        terms = [(torch.where(v.isfinite(), v, 0) * g).sum() for v, g in rows]
        return found._asdict(), sum(terms, torch.zeros(()))
    found = function(*sides, *targets, **settings)
    return {"value": found}, found if found.ndim == 0 else (found * problem.row_gradient[0]).sum()


# ---- what is refused -----------------------------------------------------------------------------


def refusals(rank: int, world: int) -> dict[str, Callable[[], object]]:
    """Calls that differ between ranks, or that no rank may make; each raises on all of them."""
    last = rank == world - 1
    own = slices(Case("", ""), world)[rank]
    student, teacher = (make_side(8, VOCAB, width, seed=i) for i, width in enumerate(WIDTHS))
    targets = make_targets(8, VOCAB)

    def head(rows: int = 5, width: int = 16, dtype: Any = torch.float32, **given: Any) -> LMHead:
        bias = given.pop("bias", None)
        return LMHead.sharded(
            torch.zeros(rows, width, dtype=dtype), bias, group=dist.group.WORLD, **given
        )

    def part(side: Side) -> LMHead:
        return LMHead.sharded(side.weight.detach()[own], group=dist.group.WORLD)

    def loss(rows: int = 8, hidden: Tensor | None = None, **given: Any) -> object:
        hidden = student.hidden.detach() if hidden is None else hidden
        taught = teacher.hidden.detach()[:rows]
        return linear_distill_loss(hidden[:rows], part(student), taught, part(teacher), **given)

    def by_kind() -> object:
        if last:
            return linear_log_prob(student.hidden, part(student), targets)
        return linear_cross_entropy(student.hidden, part(student), targets)

    def masked(value: float) -> object:
        bias = torch.full((5,), value)
        own = LMHead.sharded(torch.zeros(5, 16), bias, group=dist.group.WORLD)
        return linear_cross_entropy(student.hidden, own, targets % (5 * world))

    def trained() -> Tensor:
        return student.hidden.detach().clone().requires_grad_(last)

    def against(teacher_head: Any, **given: Any) -> object:
        sides = student.hidden, part(student), teacher.hidden.detach(), teacher_head
        return linear_distill_loss(*sides, **given)

    ids = targets[:, None]
    return {
        "width": lambda: head(width=8 + 8 * last),
        "dtype": lambda: head(dtype=torch.bfloat16 if last else torch.float32),
        "bias": lambda: head(bias=torch.zeros(5) if last else None),
        "softcap": lambda: head(softcap=30.0 if last else None),
        "empty": lambda: head(rows=5 * (not last)),
        "gap": lambda: head(start=6 * rank),
        "overlap": lambda: head(start=4 * rank),
        "vocab_size": lambda: head(vocab_size=5 * world + 1),
        "no group": lambda: LMHead.sharded(torch.zeros(5, 16)),
        "group": lambda: LMHead.sharded(torch.zeros(5, 16), group="world"),  # type: ignore
        "shard": lambda: LMHead(torch.zeros(7, 16), shard=head().shard),
        "rows": lambda: loss(rows=8 - last),
        "gradient": lambda: loss(hidden=trained()),
        "divergence": lambda: loss(divergence="jsd" if last else "forward_kl"),
        "beta": lambda: loss(divergence="jsd", beta=0.3 if last else 0.5),
        "budget": lambda: loss(memory_budget=20_000 * (1 + last)),
        "call": by_kind,
        "nan": lambda: masked(torch.nan if last else 0.0),
        "masked": lambda: masked(-torch.inf),
        "targets": lambda: loss(targets=targets + VOCAB),
        "tolerance": lambda: loss(gradient_tolerance=0.1),
        "top-p": lambda: loss(teacher_top_p=0.9),
        "top-k": lambda: linear_distill_loss(
            student.hidden, part(student), TopKTeacher(ids, torch.zeros(8, 1))
        ),
        "top-k signals": lambda: linear_dudi_loss(
            student.hidden,
            part(student),
            TopKTeacher(ids, torch.zeros(8, 1)),
            None,
            targets,
            torch.arange(8),
        ),
        "verbalizer": lambda: against(part(teacher), verbalizer=Verbalizer.prefix(VOCAB, VOCAB)),
        "whole teacher": lambda: against(teacher.weight.detach()),
        "whole student": lambda: linear_distill_loss(
            student.hidden, student.weight.detach(), teacher.hidden.detach(), part(teacher)
        ),
        "slices": lambda: against(head(rows=5, width=24)),
        **of_dtensors(world),
    }


def of_dtensors(world: int) -> dict[str, Callable[[], object]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, weight = init_device_mesh("cpu", (world,)), torch.zeros(20, 16)
    grid = init_device_mesh("cpu", (1, world))
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    return {
        "dtensor": lambda: LMHead(sharded),
        "columns": lambda: LMHead.sharded(distribute_tensor(weight, mesh, [Shard(1)])),
        "replicated": lambda: LMHead.sharded(distribute_tensor(weight, mesh, [Replicate()])),
        "grid": lambda: LMHead.sharded(distribute_tensor(weight, grid, [Replicate(), Shard(0)])),
        "tiny": lambda: LMHead.sharded(distribute_tensor(weight[:1], mesh, [Shard(0)])),
    }


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


# ---- memory, models and compilers ----------------------------------------------------------------

BIG_ROWS, BIG_VOCAB, BIG_WIDTH, BIG_BUDGET = 512, 16_384, 128, 3_000_000


def memory(rank: int, world: int) -> dict[str, tuple[int, int]]:
    """Peak and largest allocation of this rank, in bytes."""
    from test_memory import measure

    rows = BIG_VOCAB // world
    student, teacher = (make_side(BIG_ROWS, rows, BIG_WIDTH, seed=10 * rank + i) for i in range(2))
    hidden = make_side(BIG_ROWS, 1, BIG_WIDTH).hidden
    sides = (
        hidden,
        *(LMHead.sharded(s.weight, group=dist.group.WORLD) for s in (student, teacher)),
    )
    found = {}
    for function, divergence in (("linear_distill_loss", "jsd"), ("linear_distill", "forward_kl")):

        def step(function: str = function, divergence: str = divergence) -> None:
            result = getattr(dudi_kernels, function)(
                *sides[:2],
                hidden.detach(),
                sides[2],
                divergence=divergence,
                memory_budget=BIG_BUDGET,
            )
            result[0].sum().backward()

        found[function] = tuple(measure(step))
    return found


def compiled(rank: int, world: int) -> Results:
    """The distances of compiled from plain calls, and how many graphs there are after two."""
    from torch._dynamo.testing import CompileCounterWithBackend

    found = {}
    for name in ("loss-uneven-jsd", "rows-uneven-forward_kl"):
        case = next(case for case in cases() if case.name == name)
        plain = compute(case, world, rank)
        function = getattr(dudi_kernels, case.function)
        graphs = CompileCounterWithBackend("aot_eager")
        own = torch.compile(function, fullgraph=True, backend=graphs)
        for _ in range(2):  # each with heads of its own
            again = compute(case, world, rank, function=own)
        apart = [error(again[k].nan_to_num(7), plain[k].nan_to_num(7)) for k in plain]
        found[name] = torch.tensor([max(apart), graphs.frame_count])
    return found


def of_model(mesh: Any) -> LMHead:
    """Of a model whose head transformers' way of tensor parallelism has sharded."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = parallelize_module(LlamaForCausalLM(config), mesh, {"lm_head": ColwiseParallel()})
    return LMHead.from_model(model, group=mesh)


def main(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    distributed_adaptive.FIRST = 4  # so that ranks have to show more
    found: dict[str, Any] = {"again": {}}
    for case in cases():
        if world == 2 or not case.name.startswith("triton"):
            found[case.name] = compute(case, world, rank, mesh)
            if world == 2:  # for the bits
                found["again"][case.name] = compute(case, world, rank, mesh)
    found["refused"] = {name: message(call) for name, call in refusals(rank, world).items()}
    if world == 2:
        found["memory"] = memory(rank, world)
        found["compiled"] = compiled(rank, world)
        head = of_model(mesh)
        found["model"] = (head.weight.detach(), head.shard.bounds if head.shard else None)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
