"""Peak allocated bytes, by torch's own profiler: no (N, V) tensor, no gradient nobody wants."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import error, make_side, make_targets
from torch.profiler import ProfilerActivity, profile

from dudi_kernels import (
    TopKTeacher,
    Verbalizer,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
    plan_memory,
    prepare,
)
from dudi_kernels.backends import native
from dudi_kernels.plan import DEFAULT_BUDGET, plan_block, plan_retain

ROWS, VOCAB, WIDTH = 512, 16_384, 24
DENSE = ROWS * VOCAB * 4  # bytes of one (N, V) fp32 tensor: 33.6 MB
HEAD = VOCAB * WIDTH * 4  # 1.6 MB
BUDGET = 6_000_000
SLACK = 400_000  # results, O(N) vectors, hidden states' gradient


class Memory(NamedTuple):
    peak: int  # bytes above the start
    largest: int  # single allocation


def measure(function: Callable[[], object]) -> Memory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = function()
    assert run.profiler is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    del result
    assert peak > 0
    return Memory(peak, largest)


@pytest.fixture
def problem():
    student = make_side(ROWS, VOCAB, WIDTH)
    teacher = make_side(ROWS, VOCAB, 40, seed=9)
    segments = torch.arange(8).repeat_interleave(ROWS // 8)
    return student, teacher, make_targets(ROWS, VOCAB), segments


def losses(student, teacher, targets, segments, budget, backend):
    settings = {"memory_budget": budget, "backend": backend}
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    return {
        "distill": lambda: linear_distill_loss(*sides, divergence="jsd", **settings).loss,
        "tempered": lambda: (
            linear_distill_loss(
                *sides, divergence="skew_reverse_kl", temperature=2.0, **settings
            ).loss
        ),
        "adaptive": lambda: linear_distill_loss(*sides, divergence="adaptive_kl", **settings).loss,
        "adaptive-rows": lambda: linear_distill(
            *sides, divergence="adaptive_kl", **settings
        ).divergence.sum(),
        "dudi": lambda: (
            linear_dudi_loss(
                *sides,
                targets,
                segments,
                preference_weight=0.1,
                reference_log_prob="teacher",
                **settings,
            ).loss
        ),
        "cross-entropy": lambda: linear_cross_entropy(*sides[:2], targets, **settings),
        "log-prob": lambda: linear_log_prob(*sides[:2], targets, **settings).sum(),
    }


NAMES = ("distill", "tempered", "adaptive", "dudi", "cross-entropy", "log-prob")


INTERPRETED = [("distill", "triton"), ("log-prob", "triton")]  # slow at these shapes


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        *(
            (n, "torch", d)
            for n in (*NAMES, "adaptive-rows")
            for d in (torch.float32, torch.bfloat16)
        ),
        *((name, backend, torch.float32) for name, backend in INTERPRETED),
    ],
    ids=str,
)
def test_the_budget_holds(name, dtype, problem, backend):
    student, teacher, targets, segments = problem
    for side in (student, teacher):
        side.hidden = side.hidden.detach().to(dtype).requires_grad_()
        side.weight = side.weight.detach().to(dtype).requires_grad_()
    loss = losses(student, teacher, targets, segments, BUDGET, backend)[name]
    used = measure(lambda: loss().backward())
    gradients = HEAD * 2 if dtype == torch.bfloat16 else HEAD  # fp32, then in its own dtype
    assert used.peak <= BUDGET * 1.1 + gradients + SLACK
    assert used.largest < DENSE / 5


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_head_has_no_gradient_buffer(name, problem):
    student, teacher, targets, segments = problem
    rows = 18 if native.library() is None else 5  # temporaries, and both sides' logits
    least = rows * VOCAB * 4  # so small that the head's gradient would be the largest allocation
    loss = losses(student, teacher, targets, segments, least, "torch")[name]
    trained = measure(lambda: loss().backward())
    with torch.no_grad():
        quiet = measure(loss)
    student.weight.requires_grad_(False)
    frozen = measure(lambda: loss().backward())
    assert trained.largest == HEAD or name == "log-prob"
    assert trained.peak > HEAD
    assert max(frozen.largest, quiet.largest) < HEAD / 2
    assert max(frozen.peak, quiet.peak) < trained.peak - HEAD / 2


def test_the_measurement_sees_dense_logits(problem):
    student, _, targets, _ = problem
    dense = measure(
        lambda: torch.nn.functional.cross_entropy(student.hidden @ student.weight.T, targets)
    )
    assert dense.peak >= 2 * DENSE and dense.largest == DENSE


def test_plans():
    plan = plan_retain(VOCAB, (WIDTH, 40), False, BUDGET)
    assert 4 < plan.chunk_rows < ROWS and 1 <= plan.tile_rows <= plan.chunk_rows
    assert plan_retain(262_144, (640, 640), False, 2**28).chunk_rows >= 64
    elsewhere = plan_retain(262_144, (640, 640), False, 2**28, cached=False)
    assert elsewhere.chunk_rows >= 64 and elsewhere.tile_rows == 8  # fewer launches
    with pytest.raises(
        ValueError, match=r"memory_budget must be at least ([\d,]+) bytes"
    ) as caught:
        plan_retain(VOCAB, (WIDTH, 40), True, 1000)
    least = int(str(caught.value).split("least ")[1].split(" ")[0].replace(",", ""))
    assert plan_retain(VOCAB, (WIDTH, 40), True, least) == (1, 1, 1)
    with pytest.raises(ValueError, match=f"got {least - 1:,}"):
        plan_retain(VOCAB, (WIDTH, 40), True, least - 1)
    assert plan_block(100_000, (WIDTH,), False, 2**26, cell=4)[0] < 4096
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        plan_block(100_000, (WIDTH,), False, 2**10, cell=4)


@pytest.mark.parametrize("rows", [4096, 8192, 16_384, 65_536, 131_072])
def test_blocks_of_columns_are_whole(rows):
    """An odd stride of the gradient's buffer is another kernel, and a slower GEMM."""
    for cell in (2, 4, 8):
        block, _ = plan_block(rows, (896,), cell == 4, DEFAULT_BUDGET, cell=cell, temporaries=False)
        assert block % 128 == 0
    budget = 100 * (2 * rows + 896 * 4)
    narrow, _ = plan_block(rows, (896,), False, budget, cell=2, temporaries=False)
    assert narrow == 96


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per_row"])
def test_the_default_budget_holds_many_rows(per_row, dtype, monkeypatch):
    """Of fp16, whose last two GEMMs convert to fp32, no copy of all rows is held."""
    pytest.importorskip("triton", reason="triton is not installed")
    from dudi_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    for rows in (4096, 16_384, 32_768):
        plan = plan_memory(rows, 128_256, 2048, 4096, dtype=dtype, device="cuda", per_row=per_row)
        assert plan.workspace <= DEFAULT_BUDGET * 1.01


@pytest.mark.parametrize(
    ("backend", "rows", "budget"), [("torch", 2048, 2_500_000), ("triton", 288, 320_000)]
)
def test_many_rows_are_converted_in_pieces(backend, rows, budget):
    """fp16 and few columns a block: what is held is as planned, whatever the number of rows."""
    vocab, width = 400, 64
    sides = [make_side(rows, vocab, width, torch.float16, seed=seed) for seed in (0, 9)]
    targets = make_targets(rows, vocab)
    student, teacher = sides
    settings: dict[str, Any] = {"memory_budget": budget, "backend": backend}

    def run(**settings):
        both = student.hidden, student.head, teacher.hidden, teacher.head
        got = linear_distill(*both, targets=targets, divergence="jsd", **settings)
        (got.divergence.sum() + got.log_prob.sum()).backward()
        return [t.grad.clone() for t in student.inputs]

    run(**settings)  # a first call makes what stays
    for tensor in student.inputs:
        tensor.grad = None
    used = measure(lambda: run(**settings))
    grads = [t.grad for t in student.inputs]
    settings |= {"dtype": torch.float16, "divergence": "jsd"}
    plan = plan_memory(rows, vocab, width, width, per_row=True, **settings)
    vectors = rows * 400
    assert plan.workspace <= budget * 1.01 and plan.block_columns < 300
    assert used.peak <= plan.peak * 1.1 + vectors
    if backend == "triton" or native.library() is not None:
        assert used.peak >= plan.peak * 0.9
    for tensor in student.inputs:
        tensor.grad = None
    for got, want in zip(grads, run(backend=backend), strict=True):  # a single block
        assert error(got, want) <= 1e-3


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(
    ("rows", "vocab", "budget", "wanted"),
    [(3000, 512, 10_000, "retain"), (3, 9000, 50_000, "recompute")],
    ids=["many rows", "a large vocabulary"],
)
def test_the_strategy_that_fits(rows, vocab, budget, wanted, backend, monkeypatch):
    """The dearer one too, where the budget doesn't hold the other."""
    monkeypatch.setattr(prepare, "prefers_recompute", lambda *arguments: wanted == "retain")
    student, teacher = make_side(rows, vocab, 24), make_side(rows, vocab, 16, seed=9)
    sides = student.hidden, student.head, teacher.hidden, teacher.head
    settings: dict[str, Any] = {"memory_budget": budget, "backend": backend}
    assert plan_memory(rows, vocab, 24, 16, **settings).strategy == wanted
    if rows < 100:  # interpreted
        got = linear_distill_loss(*sides, **settings).loss
        want = linear_distill_loss(*sides, backend=backend).loss
        assert error(got, want) <= 1e-5
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        linear_distill_loss(*sides, backend=backend, memory_budget=100)
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        plan_memory(rows, vocab, 24, 16, backend=backend, memory_budget=100)


def advised(call: Callable[[int], object], given: int = 10) -> int:
    """The least budget that works, as the error says."""
    with pytest.raises(ValueError, match=f"memory_budget must be .* got {given:,}$") as caught:
        call(given)
    return int(str(caught.value).split("least ")[1].split(" ")[0].replace(",", ""))


@pytest.mark.parametrize("temporaries", [False, True])
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("whole_rows", [0, VOCAB])
@pytest.mark.parametrize("rows", [1, 512])
def test_the_least_block(rows, whole_rows, convert, temporaries):
    settings = {"temporaries": temporaries, "whole_rows": whole_rows, "cell": 2 * 4}

    def plan(budget):
        return plan_block(rows, (64, 48), convert, budget, **settings)

    least = advised(plan)
    assert min(plan(least)) >= 1 and advised(plan, least - 1) == least
    if whole_rows:
        assert plan_retain(VOCAB, (64, 48), convert, least, temporaries=temporaries)
    else:
        assert plan(least) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "adaptive_kl"])
@pytest.mark.parametrize("function", [linear_distill, linear_distill_loss])
def test_the_least_budget_works(function, divergence, dtype):
    student, teacher = make_side(9, 37, 16, dtype), make_side(9, 37, 12, dtype, seed=9)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)

    def run(budget):
        return function(*sides, divergence=divergence, memory_budget=budget)

    least = advised(run)
    torch.testing.assert_close(run(least).divergence, run(2**28).divergence)
    per_row = function is linear_distill
    settings: dict[str, Any] = {"dtype": dtype, "divergence": divergence, "per_row": per_row}
    assert advised(lambda b: plan_memory(9, 37, 16, 12, memory_budget=b, **settings)) == least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 16_384, 24, 40), (128, 50_000, 64, 64)], ids=str)
@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per_row"])
@pytest.mark.parametrize("budget", [9_000_000, 30_000_000])
def test_plan_memory_tells_what_is_measured(budget, per_row, shape, dtype):
    rows, vocab, width, teacher_width = shape
    student = make_side(rows, vocab, width, dtype)
    teacher = make_side(rows, vocab, teacher_width, dtype, seed=9)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    settings = {"divergence": "jsd", "memory_budget": budget}

    def run():
        if per_row:
            linear_distill(*sides, **settings).divergence.sum().backward()
        else:
            linear_distill_loss(*sides, **settings).loss.backward()

    used = measure(run)
    plan = plan_memory(*shape, per_row=per_row, dtype=dtype, **settings)
    assert plan.strategy == ("recompute" if per_row else "retain")
    assert plan.workspace <= budget * 1.01
    assert used.peak <= plan.peak * 1.1
    if native.library() is not None:
        assert used.peak >= plan.peak * 0.9


def test_plan_memory_with_many_blocks():
    """Nothing of a block outlives it."""
    rows, vocab, width, budget = 1024, 6_000, 16, 1_000_000
    student, teacher = make_side(rows, vocab, width), make_side(rows, vocab, width, seed=9)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)

    def run():
        got = linear_distill(*sides, memory_budget=budget)
        (got.divergence + got.entropy).sum().backward()

    plan = plan_memory(rows, vocab, width, width, per_row=True, memory_budget=budget)
    assert vocab / plan.block_columns > 40
    vectors = rows * 400  # bytes of the states of rows and of what puts two together
    assert measure(run).peak <= plan.peak * 1.1 + vectors


@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per_row"])
def test_plan_memory_of_adaptive_kl(per_row):
    student, teacher = make_side(128, 50_000, 64), make_side(128, 50_000, 64, seed=9)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    settings: dict[str, Any] = {"divergence": "adaptive_kl", "memory_budget": 30_000_000}

    def run():
        if per_row:
            linear_distill(*sides, **settings).divergence.sum().backward()
        else:
            linear_distill_loss(*sides, **settings).loss.backward()

    plan = plan_memory(128, 50_000, 64, 64, per_row=per_row, **settings)
    assert plan.workspace <= 30_000_000 * 1.01
    peak = measure(run).peak
    assert peak <= plan.peak * 1.1
    if native.library() is not None:
        assert peak >= plan.peak * 0.9


@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per_row"])
@pytest.mark.parametrize("teacher_vocab", [20_000, 9_000])
def test_plan_memory_with_a_verbalizer(teacher_vocab, per_row):
    """Many to one, and a bucket; the budget holds."""
    student, teacher = make_side(ROWS, VOCAB, WIDTH), make_side(ROWS, teacher_vocab, 40, seed=9)
    verbalizer = Verbalizer.from_coo(
        torch.arange(teacher_vocab),
        torch.arange(teacher_vocab) % 7001,
        torch.full((teacher_vocab,), 0.9),
        teacher_size=teacher_vocab,
        student_size=VOCAB,
    )
    assert verbalizer.classes.size == 7002
    settings: dict[str, Any] = {"memory_budget": 12_000_000, "verbalizer": verbalizer}
    wanted = plan_memory(ROWS, VOCAB, WIDTH, 40, per_row=per_row, divergence="jsd", **settings)
    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    function = linear_distill if per_row else linear_distill_loss
    found = measure(lambda: function(*sides, divergence="jsd", **settings)[0].sum().backward())
    assert wanted.workspace <= 12_000_000
    assert found.peak <= wanted.peak * 1.1 + SLACK
    if native.library() is not None:  # else it is an upper bound
        assert found.peak >= wanted.peak * 0.9 - SLACK


@pytest.mark.parametrize("top_k", [64, 1024])
@pytest.mark.parametrize("function", [linear_distill_loss, linear_dudi_loss])
def test_plan_memory_of_likeliest_tokens(function, top_k):
    student, targets = make_side(ROWS, VOCAB, WIDTH), make_targets(ROWS, VOCAB)
    log_probs, ids = torch.randn(ROWS, VOCAB).log_softmax(-1).topk(top_k)
    sides = student.hidden, student.head, TopKTeacher(ids, log_probs), None
    packed = (targets, torch.zeros_like(targets)) if function is linear_dudi_loss else ()
    budget = 12_000_000
    plan = plan_memory(ROWS, VOCAB, WIDTH, top_k=top_k, memory_budget=budget)
    assert plan.strategy == "retain" and plan.workspace <= budget
    found = measure(lambda: function(*sides, *packed, memory_budget=budget).loss.backward())
    assert found.peak <= plan.peak * 1.1
    if native.library() is not None:  # very many tokens: most of it is what some losses need
        assert found.peak >= plan.peak * (0.9 if top_k < 1000 else 0.8)


def test_plan_memory_counts_the_gemms():
    one = 2 * 512 * 150_000 * 896
    teacher = 2 * 512 * 150_000 * 2048
    assert plan_memory(512, 150_000, 896, 2048).flops == 3 * one + teacher
    assert plan_memory(512, 150_000, 896, 2048, per_row=True).flops == 4 * one + 2 * teacher
    rows = plan_memory(512, 150_000, 896, 2048, per_row=True, divergence="adaptive_kl")
    assert rows.flops == 4 * one + 2 * teacher  # one forward pass, over rows
    assert plan_memory(512, 150_000, 896, train_weight=False).flops == 2 * one
    frozen = plan_memory(512, 150_000, 896, train_weight=False)
    assert frozen.gradients == 512 * 896 * 4
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        plan_memory(512, 0, 896)


SCALARS = [  # N, V, D, E, memory_budget: either strategy, and blocks that the budget limits
    (128, 4096, 24, 40, 9_000_000),
    (128, 4096, 24, 40, 400_000),
    (96, 3000, 400, 400, 9_000_000),
    (3, 9000, 24, None, 9_000_000),
]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("shape", SCALARS, ids=str)
@pytest.mark.parametrize("train_weight", [True, False])
def test_plan_memory_of_a_scalar_loss_by_kernels(shape, train_weight, backend, monkeypatch):
    """The strategy is the one that runs, and its memory what is measured."""
    rows, vocab, width, teacher_width, budget = shape
    student, targets = make_side(rows, vocab, width), make_targets(rows, vocab)
    teacher = None if teacher_width is None else make_side(rows, vocab, teacher_width, seed=9)
    student.weight.requires_grad_(train_weight)
    settings: dict[str, Any] = {"memory_budget": budget, "backend": backend}
    ran: list[str] = []

    def recorded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*arguments: Any) -> Any:
            ran.append(name)
            return real(*arguments)

        return apply

    for name, kind in (("retain", prepare.Retain), ("recompute", prepare.Streamed)):
        monkeypatch.setattr(kind, "apply", recorded(name, kind.apply))

    def run():
        if teacher is None:
            linear_cross_entropy(student.hidden, student.head, targets, **settings).backward()
            return
        sides = student.hidden, student.head, teacher.hidden, teacher.head
        linear_distill_loss(*sides, divergence="jsd", **settings).loss.backward()

    gc.collect()
    peak = measure(run).peak
    plan = plan_memory(
        rows, vocab, width, teacher_width, divergence="jsd", train_weight=train_weight, **settings
    )
    assert ran == [plan.strategy] == ["retain" if width == 400 else "recompute"]
    assert plan.workspace <= budget * 1.01
    vectors = rows * 200  # the rows' state and results
    assert plan.peak * 0.9 <= peak <= plan.peak * 1.1 + vectors


def test_plan_memory_of_kernels_on_a_gpu_that_is_not_there(monkeypatch):
    """bf16 on CUDA: a block of the gradient in bf16 is all that is held."""
    pytest.importorskip("triton", reason="triton is not installed")
    from dudi_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    rows, vocab, width, teacher_width = 4096, 151_936, 896, 2048
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    plan = plan_memory(rows, vocab, width, teacher_width, **settings)
    assert plan.strategy == "recompute" and plan.block_columns == 4096
    assert plan.workspace == 4096 * (rows * 2 + width * 4)
    one = 2 * rows * vocab
    assert plan.flops == one * (4 * width + 2 * teacher_width)
    few = plan_memory(1, vocab, width, train_weight=False, train_hidden=False, **settings)
    assert few.workspace == 15 * 396 * 4  # partial results of a row's splits
    adaptive = plan_memory(rows, vocab, width, teacher_width, divergence="adaptive_kl", **settings)
    assert adaptive.strategy == "retain"
