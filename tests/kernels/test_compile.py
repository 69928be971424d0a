"""torch.compile(fullgraph=True) over every public function, and what torch asks of operators."""

from __future__ import annotations

import pytest
import torch
from cases import error, make_side, make_targets

import dudi_kernels.compiled as compiled
from dudi_kernels import (
    LMHead,
    LoRA,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
    sequence_log_prob,
)

ROWS, VOCAB, WIDTH = 24, 301, 16


@pytest.fixture
def student():
    return make_side(ROWS, VOCAB, WIDTH, bias=True, softcap=5.0)


@pytest.fixture
def teacher():
    return make_side(ROWS, VOCAB, 20, seed=3)


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
    torch.compiler.reset()


def test_frozen_parts_and_no_grad(student, teacher):
    student.weight.requires_grad_(False)
    run = torch.compile(FUNCTIONS["cross_entropy"], fullgraph=True, backend="aot_eager")
    run(student, teacher).backward()
    assert student.weight.grad is None and student.hidden.grad is not None
    with torch.no_grad():
        assert not run(student, teacher).requires_grad
    torch.compiler.reset()


def test_checks_still_speak(student, teacher):
    run = torch.compile(
        lambda s, y: linear_cross_entropy(s.hidden, s.weight, y),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match=r"targets must be in .* at row 2"):
        run(student, TARGETS.clone().index_fill(0, torch.tensor([2]), VOCAB))
    torch.compiler.reset()


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
    tensors, places = compiled._flatten(arguments)
    needs = [t.requires_grad for t in tensors]
    torch.library.opcheck(operator, (tensors, name, compiled._write(places), needs))


def test_the_backward_operator_is_what_torch_asks(student, teacher):
    _, arguments = _calls(student, teacher)["linear_distill"]
    tensors, places = compiled._flatten(arguments)
    needs = [t.requires_grad for t in tensors]
    grads, there = [torch.randn(ROWS), torch.randn(ROWS)], [True, False, True, False]
    own = [t.detach() for t in tensors]
    text = compiled._write(places)
    torch.library.opcheck(
        compiled.rows_backward, (grads, there, own, "linear_distill", text, needs)
    )
