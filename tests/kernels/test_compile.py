"""torch.compile(fullgraph=True) over every public function, and what torch asks of operators."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from cases import error, make_side, make_targets
from torch._dynamo.testing import CompileCounterWithBackend

import dudi_kernels.compiled as compiled
from dudi_kernels import (
    LMHead,
    LoRA,
    TopKTeacher,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
    sequence_log_prob,
)

ROWS, VOCAB, WIDTH = 24, 301, 16


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.fixture
def student():
    return make_side(ROWS, VOCAB, WIDTH, bias=True, softcap=5.0)


@pytest.fixture
def teacher():
    return make_side(ROWS, VOCAB, 20, seed=3)


INDUCTOR = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own


@pytest.fixture
def own_cache(monkeypatch, tmp_path_factory):
    """What inductor keeps of earlier sessions does not see that an operator has changed."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    directory = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory))


SEGMENTS = torch.arange(4).repeat_interleave(ROWS // 4)
TARGETS = make_targets(ROWS, VOCAB)


def head(side):
    return LMHead(side.weight, side.bias, side.softcap, side.scale)


FUNCTIONS = {
    "distill_loss": lambda s, t: (
        linear_distill_loss(
            s.hidden, head(s), t.hidden, t.weight, divergence="jsd", targets=TARGETS, ce_weight=0.3
        ).loss
    ),
    "distill_loss_values": lambda s, t: (
        linear_distill_loss(s.hidden, head(s), t.hidden, t.weight).loss * 2.0
    ),
    "distill": lambda s, t: (
        lambda r: (r.divergence * 0.5 + r.entropy).sum() + r.log_prob.square().sum()
    )(linear_distill(s.hidden, head(s), t.hidden, t.weight, targets=TARGETS)),
    "cross_entropy": lambda s, t: linear_cross_entropy(s.hidden, head(s), TARGETS),
    "cross_entropy_rows": lambda s, t: (
        linear_cross_entropy(s.hidden, head(s), TARGETS, reduction="none").square().sum()
    ),
    "log_prob": lambda s, t: linear_log_prob(s.hidden, head(s), TARGETS, temperature=0.7).sum(),
    "sequence_log_prob": lambda s, t: (
        sequence_log_prob(s.hidden, head(s), TARGETS, SEGMENTS, num_segments=4).square().sum()
    ),
    "dudi": lambda s, t: (
        linear_dudi_loss(
            s.hidden,
            head(s),
            t.hidden,
            t.weight,
            TARGETS,
            SEGMENTS,
            preference_weight=0.2,
            reference_log_prob="teacher",
            num_pairs=2,
        ).loss
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_equals_eager(name, student, teacher):
    function = FUNCTIONS[name]
    teacher.hidden.requires_grad_(False)
    teacher.weight.requires_grad_(False)
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        for tensor in student.inputs:
            tensor.grad = None
        loss = run(student, teacher)
        loss.backward()
        results.append((loss.detach(), [t.grad.clone() for t in student.inputs]))
    (eager, gradients), (graph, others) = results
    assert error(graph, eager) < 1e-6
    for a, b in zip(others, gradients, strict=True):
        assert error(a, b) < 1e-6


def test_frozen_parts_and_no_grad(student, teacher):
    student.weight.requires_grad_(False)
    run = torch.compile(FUNCTIONS["cross_entropy"], fullgraph=True, backend="aot_eager")
    run(student, teacher).backward()
    assert student.weight.grad is None and student.hidden.grad is not None
    with torch.no_grad():
        assert not run(student, teacher).requires_grad


def test_checks_still_speak(student, teacher):
    run = torch.compile(
        lambda s, y: linear_cross_entropy(s.hidden, s.weight, y),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match=r"targets must be in .* at row 2"):
        run(student, TARGETS.clone().index_fill(0, torch.tensor([2]), VOCAB))


def test_keywords_in_any_order(student):
    run = torch.compile(
        lambda s: linear_cross_entropy(
            reduction="none", targets=TARGETS, head=head(s), hidden=s.hidden
        ).view(4, -1),
        fullgraph=True,
        backend="aot_eager",
    )
    want = linear_cross_entropy(student.hidden, head(student), TARGETS, reduction="none")
    assert error(run(student).flatten(), want) < 1e-6


def test_arguments_that_do_not_fit_are_refused(student):
    run = torch.compile(
        lambda s: linear_cross_entropy(s.hidden, head(s), TARGETS, "sum"),  # type: ignore
        backend="aot_eager",
    )
    with pytest.raises(TypeError, match="positional"):
        run(student)


@INDUCTOR
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_prob])
def test_tensors_that_are_not_contiguous(function, own_cache):
    """With inductor, which relies on the strides that an operator has promised."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, WIDTH, generator=random).transpose(0, 1).requires_grad_()
    weight = torch.randn(WIDTH, VOCAB, generator=random).T.requires_grad_()
    targets = TARGETS.view(4, 6)

    def loss():
        return function(hidden, weight, targets).sum()

    want = torch.autograd.grad(loss(), (hidden, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(), (hidden, weight))
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def _top_k(teacher):
    values = torch.log_softmax(teacher.hidden @ teacher.weight.T, -1).detach().topk(5)
    return values.indices, values.values


@pytest.mark.parametrize("name", ["distill_loss", "dudi"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_teacher_of_few_tokens(where, name, student, teacher):
    ids, log_probs = _top_k(teacher)
    outside = TopKTeacher(ids, log_probs)

    def loss():
        guide = TopKTeacher(ids, log_probs) if where == "inside" else outside
        sides = student.hidden, head(student), guide, None
        if name == "distill_loss":
            return linear_distill_loss(*sides).loss
        settings: dict[str, Any] = {"num_pairs": 2, "preference_weight": 0.3, "ce_weight": 0.2}
        return linear_dudi_loss(*sides, TARGETS, SEGMENTS, **settings).loss

    want = torch.autograd.grad(loss(), student.inputs)
    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(run(), student.inputs)
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def test_a_wrong_teacher_of_few_tokens_is_refused(student, teacher):
    ids, log_probs = _top_k(teacher)
    run = torch.compile(
        lambda ids: linear_distill_loss(student.hidden, head(student), TopKTeacher(ids, log_probs)),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match="ids must not name a token twice, row 0"):
        run(torch.zeros_like(ids))


def _dudi(s, t, **settings):
    return linear_dudi_loss(
        s.hidden, head(s), t.hidden, t.weight, TARGETS, SEGMENTS, **{"num_pairs": 2} | settings
    )


VARIED: dict[str, tuple[Any, list]] = {  # a function of a number, and numbers
    "temperature": (
        lambda s, t, x: (
            linear_distill_loss(s.hidden, head(s), t.hidden, t.weight, temperature=x).loss
        ),
        [1.0 + i / 7 for i in range(10)],
    ),
    "temperature_by_row": (
        lambda s, t, x: linear_log_prob(s.hidden, head(s), TARGETS, temperature=x).square().sum(),
        [1.0 + i / 7 for i in range(10)],
    ),
    "scale": (
        lambda s, t, x: linear_cross_entropy(s.hidden, LMHead(s.weight, scale=x), TARGETS),
        [1.0 + i / 7 for i in range(10)],
    ),
    "num_segments": (
        lambda s, t, x: (
            sequence_log_prob(s.hidden, head(s), TARGETS, SEGMENTS, num_segments=x).square().sum()
        ),
        list(range(4, 14)),
    ),
    "num_pairs": (
        lambda s, t, x: (lambda r: r.loss + len(r.margins))(_dudi(s, t, num_pairs=x)),
        list(range(2, 12)),
    ),
    "off_policy_rows": (lambda s, t, x: _dudi(s, t, off_policy_rows=x).loss, list(range(20, 30))),
    "off_policy_share": (
        lambda s, t, x: _dudi(s, t, off_policy_rows=x).loss,
        [20 + i / 7 for i in range(10)],
    ),
    "memory_budget": (
        lambda s, t, x: linear_cross_entropy(s.hidden, head(s), TARGETS, memory_budget=x),
        [2**20 + i for i in range(10)],
    ),
}


@pytest.mark.parametrize("name", VARIED)
def test_a_number_that_changes_is_compiled_twice(name, student, teacher):
    """As a constant and as an argument."""
    function, numbers = VARIED[name]
    compiles = CompileCounterWithBackend("aot_eager")
    run = torch.compile(function, fullgraph=True, backend=compiles)
    for number in numbers:
        losses = [f(student, teacher, number) for f in (function, run)]
        want, got = (torch.autograd.grad(loss, student.inputs[:2]) for loss in losses)
        assert error(losses[1], losses[0]) < 1e-6
        assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    assert compiles.frame_count == 2


@INDUCTOR
def test_numbers_that_change_with_inductor(own_cache, student, teacher):
    def function(x, segments):
        sums = sequence_log_prob(
            student.hidden, head(student), TARGETS, SEGMENTS, num_segments=segments, temperature=x
        )
        return sums.square().sum() + x * linear_cross_entropy(
            student.hidden, LMHead(student.weight, scale=x), TARGETS
        )

    run = torch.compile(function, fullgraph=True)
    for number, segments in ((1.0, 4), (1.5, 5), (2.0, 6)):
        want, got = (
            torch.autograd.grad(f(number, segments), student.inputs) for f in (function, run)
        )
        assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("name", ["distill_loss", "distill", "log_prob", "dudi"])
def test_autocast(name, where, student, teacher):
    """Of the hidden states: around the graph or a part of it."""
    function, on = FUNCTIONS[name], torch.autocast("cpu", dtype=torch.bfloat16)

    def inside(s, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(s, t)

    run = torch.compile(
        function if where == "outside" else inside, fullgraph=True, backend="aot_eager"
    )
    teacher.hidden.requires_grad_(False)
    teacher.weight.requires_grad_(False)
    exact = function(student, teacher)
    with on:
        eager, graph = function(student, teacher), run(student, teacher)
    if where == "inside":
        graph = run(student, teacher)
    assert error(graph, eager) < 1e-6 < error(exact, eager)
    want, got = (torch.autograd.grad(loss, student.inputs) for loss in (eager, graph))
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    if where == "outside":
        assert error(run(student, teacher), exact) < 1e-6


HALF = {  # with faint gradients
    "distill_loss": lambda hidden, head, t: (
        linear_distill_loss(
            hidden, head, t.hidden, t.weight, token_weight=torch.full((ROWS,), 1e-7)
        ).loss
    ),
    "some_rows": lambda hidden, head, t: (
        linear_distill_loss(
            hidden,
            head,
            t.hidden,
            t.weight,
            token_weight=torch.full((ROWS,), 1e-7),
            targets=TARGETS.masked_fill(torch.arange(ROWS) < 4, -100),
        ).loss
    ),
    "dudi": lambda hidden, head, t: (
        linear_dudi_loss(
            hidden,
            head,
            t.hidden,
            t.weight,
            TARGETS,
            SEGMENTS,
            preference_weight=1.0,
            off_policy_rows=1e7,
            on_policy_rows=1e7,
            pairs=1e7,
            num_pairs=2,
        ).loss
    ),
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_rounded_after_the_loss_is_scaled(name, lora, teacher):
    """As in eager mode; the gradients of a LoRA's A and of hidden states pass its product."""
    random = torch.Generator().manual_seed(1)
    shapes = [(ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,), *([(3, WIDTH), (VOCAB, 3)] if lora else [])]
    inputs = [
        torch.randn(s, generator=random).div(2).to(torch.float16).requires_grad_() for s in shapes
    ]

    def loss(inputs):
        hidden, weight, bias, *ab = inputs
        low = LoRA(ab[0], ab[1], 0.5) if ab else None
        return HALF[name](hidden, LMHead(weight, bias, lora=low), teacher)

    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    exact = [t.detach().float().requires_grad_() for t in inputs]
    want, eager, got = (
        torch.autograd.grad(f(own) * 2.0**24, own)
        for f, own in ((loss, exact), (loss, inputs), (run, inputs))
    )
    for a, b, c in zip(got, eager, want, strict=True):
        assert a.dtype == torch.float16
        assert error(a, c) < max(1e-3, 1.1 * error(b, c))


def _calls(student, teacher):
    lora = LoRA(torch.randn(2, WIDTH).requires_grad_(), torch.randn(VOCAB, 2).requires_grad_())
    head = LMHead(student.weight, student.bias, student.softcap, lora=lora)
    alone = {"hidden": student.hidden, "head": head, "targets": TARGETS}
    taught = {
        "student_hidden": student.hidden,
        "student_head": head,
        "teacher_hidden": teacher.hidden.detach(),
        "teacher_head": teacher.weight.detach(),
        "targets": TARGETS,
    }
    segments = {"segment_ids": SEGMENTS}
    return {
        "linear_distill_loss": (compiled.scalar, taught | {"ce_weight": 0.3}),
        "linear_cross_entropy": (compiled.scalar, alone),
        "linear_dudi_loss": (
            compiled.scalar,
            taught
            | segments
            | {"preference_weight": 0.2, "reference_log_prob": "teacher", "num_pairs": 2},
        ),
        "linear_distill": (compiled.rows, taught),
        "linear_log_prob": (compiled.rows, alone),
        "sequence_log_prob": (compiled.rows, alone | segments | {"num_segments": 4}),
    }


@pytest.mark.parametrize(
    "name",
    [
        "linear_distill_loss",
        "linear_cross_entropy",
        "linear_dudi_loss",
        "linear_distill",
        "linear_log_prob",
        "sequence_log_prob",
    ],
)
def test_operators_are_what_torch_asks(name, student, teacher):
    """All of torch's checks: schema, autograd registration, fake tensors, and eager against AOT
    dispatch with symbolic shapes, forward and backward."""
    operator, arguments = _calls(student, teacher)[name]
    flat = compiled.Flat.of(arguments)
    needs = [t.requires_grad for t in flat.tensors]
    torch.library.opcheck(operator, (flat.tensors, flat.sizes, name, flat.text, None, needs))


def test_an_operator_with_a_size_and_a_number(student):
    flat = compiled.Flat.of({"hidden": student.hidden, "head": head(student), "targets": TARGETS})
    tensors = [*flat.tensors, SEGMENTS, torch.tensor(0.5, dtype=torch.float64)]
    count = len(flat.tensors)
    text = "\n".join(
        [
            flat.text,
            f"segment_ids ('tensor', {count})",
            f"temperature ('number', {count + 1})",
            "num_segments ('size', 0)",
        ]
    )
    needs = [t.requires_grad for t in tensors]
    torch.library.opcheck(compiled.rows, (tensors, [4], "sequence_log_prob", text, None, needs))


def test_the_backward_operator_is_what_torch_asks(student, teacher):
    _, arguments = _calls(student, teacher)["linear_distill"]
    flat = compiled.Flat.of(arguments)
    needs = [t.requires_grad for t in flat.tensors]
    grads, there = [torch.randn(ROWS), torch.randn(ROWS)], [True, False, True, False]
    own = [t.detach() for t in flat.tensors]
    rest = (own, flat.sizes, "linear_distill", flat.text, None, needs)
    torch.library.opcheck(compiled.rows_backward, (grads, there, *rest))
