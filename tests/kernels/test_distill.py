"""linear_distill_loss against the float64 oracle: values and all gradients."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    KINK_RTOL,
    RTOL,
    SMALL,
    VALUE_RTOL,
    Side,
    error,
    gradient_errors,
    make_side,
    make_targets,
)
from torch import Tensor

from dudi_kernels import (
    DIVERGENCES,
    LMHead,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
)

BETA, ALPHA = 0.3, 0.2
SHAPES = [  # N, V, D, E, memory_budget
    (37, 301, 16, 24, SMALL),  # ragged; several chunks and tiles
    (1, 1031, 8, 8, 2**28),
    (64, 5003, 24, 16, 2**28),  # more than one tile of the default size, and block of columns
]
STYLES: list[dict] = [
    {},
    {"bias": True, "softcap": 3.0, "scale": 0.7},
]


def textbook(
    student: Side,
    teacher: Side,
    name: str,
    temperature: float,
    weight: Tensor | None = None,
    targets: Tensor | None = None,
    ce_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, divergence)"""
    s, t = student.logits(), teacher.logits()
    p, q = ((x / temperature).softmax(-1) for x in (t, s))
    divergence = oracle.DIVERGENCES[name](p, q, BETA, ALPHA)
    own = divergence
    if ce_weight and targets is not None:
        own = own - ce_weight * oracle.log_prob(s, targets)
    if weight is None:
        weight = torch.full((len(s),), 1 / len(s))
    return (weight.double() * own).sum(), divergence


def sides(shape, dtype=torch.float32, **style) -> tuple[Side, Side]:
    rows, vocab, width, teacher_width, _ = shape
    student = make_side(rows, vocab, width, dtype, **style)
    return student, make_side(rows, vocab, teacher_width, dtype, seed=9, **style)


def distill(student: Side, teacher: Side, **settings):
    settings = {"beta": BETA, "alpha": ALPHA, **settings}
    return linear_distill_loss(
        student.hidden, student.head, teacher.hidden, teacher.head, **settings
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:2])))
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
def test_matches_float64(divergence, shape, style, dtype, backend):
    student, teacher = sides(shape, dtype, **style)
    rows, vocab = shape[:2]
    targets, weight = make_targets(rows, vocab), 0.5 + torch.rand(rows)  # no fp16 underflow
    temperature = 1.7 if style else 1.0
    settings = {"temperature": temperature, "ce_weight": 0.4, "targets": targets}

    got = distill(
        student,
        teacher,
        backend=backend,
        divergence=divergence,
        token_weight=weight,
        memory_budget=shape[-1],
        **settings,
    )
    got.loss.backward()
    want, guide = student.double(), teacher.double()
    loss, per_row = textbook(want, guide, divergence, temperature, weight, targets, 0.4)
    loss.backward()

    assert got.loss.dtype == torch.float32 and got.loss.shape == ()
    assert error(got.loss, loss) < VALUE_RTOL
    assert error(got.divergence, per_row) < VALUE_RTOL
    assert error(got.log_prob, oracle.log_prob(want.logits(), targets)) < VALUE_RTOL
    assert error(got.entropy, oracle.entropy(want.logits())) < VALUE_RTOL
    assert error(got.teacher_entropy, oracle.entropy(guide.logits())) < VALUE_RTOL
    assert all(not v.requires_grad and v.dtype == torch.float32 for v in got[1:])
    kink = KINK_RTOL if divergence == "total_variation" else 0
    assert max(gradient_errors(student, want)) < max(RTOL[dtype], kink)
    assert [t.grad.dtype for t in student.inputs] == [dtype] * len(student.inputs)
    assert all(t.grad is None for t in teacher.inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("per_row", [False, True], ids=["retain", "recompute"])
def test_close_pairs_in_bf16(per_row, divergence, backend):
    """bf16 logits ruin the gradient where student and teacher are close; fp32 logits do not."""
    student = make_side(64, 700, 32, torch.bfloat16)
    noise = 1 + 0.01 * torch.randn(700, 32)
    hidden = student.hidden.detach()  # a shared leaf would get the teacher's gradient as well
    teacher = Side(hidden, (student.weight.detach() * noise).bfloat16(), None, None, 1.0)
    want, guide = student.double(), teacher.double()
    textbook(want, guide, divergence, 1.0)[0].backward()

    sides = (student.hidden, student.head, teacher.hidden, teacher.head)
    settings = {"divergence": divergence, "beta": BETA, "alpha": ALPHA, "backend": backend}
    if per_row:
        linear_distill(*sides, **settings).divergence.mean().backward()
    else:
        linear_distill_loss(*sides, **settings).loss.backward()
    ours = max(gradient_errors(student, want))
    student.hidden.grad = student.weight.grad = None
    textbook(student, teacher, divergence, 1.0)[0].backward()  # bf16 throughout
    naive = max(gradient_errors(student, want))
    assert ours < 5e-3
    assert naive > 10 * ours


def test_defaults_are_the_mean_forward_kl():
    student, teacher = sides(SHAPES[0])
    got = linear_distill_loss(student.hidden, student.weight, teacher.hidden, teacher.weight)
    s, t = student.logits().log_softmax(-1), teacher.logits().log_softmax(-1)
    want = F.kl_div(s, t, log_target=True, reduction="batchmean")
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=0)
    assert got.log_prob.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_count_for_nothing(backend):
    student, teacher = sides(SHAPES[0])
    targets, weight = make_targets(37, 301), torch.rand(37)
    ignored = torch.arange(37) % 3 == 1
    targets[ignored] = -7
    with torch.no_grad():
        student.hidden[ignored] = torch.nan
        teacher.hidden[ignored] = torch.inf
    settings = {"targets": targets, "ignore_index": -7, "ce_weight": 0.5, "memory_budget": SMALL}
    for own_weight in (None, weight):
        student.hidden.grad = student.weight.grad = None
        got = distill(student, teacher, backend=backend, token_weight=own_weight, **settings)
        got.loss.backward()
        want = Side(student.hidden[~ignored], student.weight, None, None, 1.0).double()
        guide = Side(teacher.hidden[~ignored], teacher.weight, None, None, 1.0).double()
        kept = None if own_weight is None else own_weight[~ignored]
        loss, divergence = textbook(want, guide, "forward_kl", 1.0, kept, targets[~ignored], 0.5)
        loss.backward()
        assert error(got.loss, loss) < VALUE_RTOL
        assert error(got.divergence[~ignored], divergence) < VALUE_RTOL
        assert all(not v[ignored].any() for v in got[1:5])
        assert error(student.hidden.grad[~ignored], want.hidden.grad) < 1e-5
        assert not student.hidden.grad[ignored].any()
        assert error(student.weight.grad, want.weight.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_counts(rows, backend):
    student, teacher = sides((rows, 301, 16, 24, 0), bias=True)
    targets = torch.full((rows,), -100)
    for got in (
        distill(student, teacher, backend=backend, targets=targets, ce_weight=1.0),
        distill(
            student, teacher, backend=backend, divergence="jsd", token_weight=torch.zeros(rows)
        ),
    ):
        for tensor in student.inputs:
            tensor.grad = None
        got.loss.backward()
        assert got.loss == 0
        assert [v.shape for v in got[1:]] == [(rows,)] * 4 + [()] * 2  # skipped and dropped
        assert all(not t.grad.any() for t in student.inputs)
    loss = linear_cross_entropy(student.hidden, student.head, targets, backend=backend)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.3, None), (1.0, 4.0)])
def test_tokens_masked_by_both_sides_are_not_there(divergence, temperature, softcap, backend):
    student, teacher = sides(SHAPES[0], bias=True, softcap=softcap)
    masked = torch.arange(301) % 4 == 0
    targets = torch.full((37,), 1)
    with torch.no_grad():
        student.bias[masked] = -torch.inf
        teacher.bias[masked] = -torch.inf
    got = distill(
        student,
        teacher,
        backend=backend,
        divergence=divergence,
        temperature=temperature,
        targets=targets,
        ce_weight=0.2,
        memory_budget=SMALL,
    )
    got.loss.backward()
    want, guide = (
        Side(s.hidden, s.weight[~masked], s.bias[~masked], softcap, 1.0).double()
        for s in (student, teacher)
    )
    loss, per_row = textbook(
        want, guide, divergence, temperature, None, torch.zeros(37, dtype=torch.long), 0.2
    )
    loss.backward()
    assert error(got.loss, loss) < VALUE_RTOL
    assert error(got.divergence, per_row) < VALUE_RTOL
    assert error(got.entropy, oracle.entropy(want.logits())) < VALUE_RTOL
    assert error(got.teacher_entropy, oracle.entropy(guide.logits())) < VALUE_RTOL
    assert error(student.hidden.grad, want.hidden.grad) < 1e-5
    assert error(student.weight.grad[~masked], want.weight.grad) < 1e-5
    assert error(student.bias.grad[~masked], want.bias.grad) < 1e-5
    assert not student.weight.grad[masked].any() and not student.bias.grad[masked].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("powers", [(0.2, 0.3), (1.0, 1.0), (1e-3, 1e-3), (3.0, 0.01)], ids=str)
@pytest.mark.parametrize("noise", [1e-2, 1e-3])
def test_alpha_beta_of_a_close_pair(noise, powers, backend):
    """Nothing cancels but the logarithms, whose rounding is all the error."""
    student, _ = sides(SHAPES[0])
    near = 1 + noise * torch.randn_like(student.weight)
    teacher = Side(student.hidden.detach(), (student.weight.detach() * near), None, None, 1.0)
    settings = {"divergence": "alpha_beta", "alpha": powers[0], "beta": powers[1]}
    got = distill(student, teacher, backend=backend, **settings)
    got.loss.backward()
    want, guide = student.double(), teacher.double()
    p, q = guide.logits().softmax(-1), want.logits().softmax(-1)
    per_row = oracle.alpha_beta(p, q, powers[1], powers[0])
    per_row.mean().backward()
    assert (got.divergence > 0).all()
    assert error(got.divergence, per_row) < 2e-6 / noise
    assert max(gradient_errors(student, want)) < 2e-6 / noise


INFINITE = {
    ("forward_kl", "student"),
    ("reverse_kl", "teacher"),
    ("jeffreys", "student"),
    ("jeffreys", "teacher"),
    ("adaptive_kl", "student"),
    ("adaptive_kl", "teacher"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("mass", [-3.0, -70.0], ids=["some", "1e-30"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_tokens_masked_by_one_side(divergence, who, mass, temperature, backend):
    """Finite where the truth is finite, inf where it is inf; gradients always finite."""
    student, teacher = sides(SHAPES[0])
    masked = torch.zeros(301)
    masked[5] = -torch.inf
    faint = torch.zeros(301)
    faint[5] = mass
    for side, name in ((student, "student"), (teacher, "teacher")):
        side.bias = (masked if name == who else faint).clone().requires_grad_()
    settings = {"divergence": divergence, "temperature": temperature, "memory_budget": SMALL}
    got = distill(student, teacher, backend=backend, **settings)
    got.loss.backward()
    assert all(t.grad.isfinite().all() for t in student.inputs)
    if (divergence, who) in INFINITE:
        assert got.loss == torch.inf
        assert (got.divergence == torch.inf).all()
        if who == "teacher":  # its gradient is infinite too: such a row gives none
            assert all(not t.grad.any() for t in student.inputs)
        return
    want, guide = student.double(), teacher.double()
    loss, per_row = textbook(want, guide, divergence, temperature)
    loss.backward()
    assert error(got.loss, loss) < VALUE_RTOL
    assert error(got.divergence, per_row) < VALUE_RTOL
    assert error(student.hidden.grad, want.hidden.grad.nan_to_num()) < 1e-5
    assert error(student.weight.grad, want.weight.grad.nan_to_num()) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_subnormal_numbers_are_not_relied_on(divergence):
    """A GPU, or a CPU told so, may take a subnormal floor of a mixture for 0."""
    student, teacher = sides(SHAPES[0], bias=True)
    with torch.no_grad():
        for side in (student, teacher):
            side.bias[::2] = -200.0  # probabilities that are 0 in fp32, of finite logits
    want, guide = student.double(), teacher.double()
    loss, _ = textbook(want, guide, divergence, 1.0)
    loss.backward()
    torch.set_flush_denormal(True)  # no effect where the CPU can't
    try:
        got = distill(student, teacher, divergence=divergence)
        got.loss.backward()
    finally:
        torch.set_flush_denormal(False)
    assert error(got.loss, loss) < VALUE_RTOL
    assert max(gradient_errors(student, want)) < 1e-5


def test_infinite_rows_of_forward_kl_keep_their_gradient():
    """p - q is the derivative even there; a zero weight keeps the row out of the loss."""
    student, teacher = sides(SHAPES[0], bias=True)
    with torch.no_grad():
        student.bias[3] = -torch.inf
    weight = (torch.arange(37) > 0).float()
    got = distill(student, teacher, token_weight=1 - weight)
    got.loss.backward()
    q, p = student.logits()[0].softmax(-1), teacher.logits()[0].softmax(-1)
    assert got.loss == torch.inf
    assert error(student.bias.grad, q - p) < 1e-5
    student.bias = None
    assert distill(student, teacher, token_weight=weight).loss.isfinite()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_masked_target_is_impossible(softcap):
    student, teacher = sides(SHAPES[0], bias=True, softcap=softcap)
    with torch.no_grad():
        student.bias[3] = teacher.bias[3] = -torch.inf
    targets = torch.full((37,), 3)
    got = distill(student, teacher, targets=targets, ce_weight=1.0)
    got.loss.backward()
    assert (got.log_prob == -torch.inf).all() and got.loss == torch.inf
    assert got.divergence.isfinite().all()
    assert all(t.grad.isfinite().all() for t in student.inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_frozen_parts_get_no_gradient(frozen, backend):
    student, teacher = sides(SHAPES[0], bias=True)
    want, guide = student.double(), teacher.double()
    textbook(want, guide, "jsd", 1.0)[0].backward()
    if frozen != "head":
        student.hidden.requires_grad_(False)
    if frozen != "hidden":
        student.weight.requires_grad_(False)
        student.bias.requires_grad_(False)
    loss = distill(student, teacher, backend=backend, divergence="jsd").loss
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for own, true in zip(student.inputs, want.inputs, strict=True):
        assert (own.grad is not None) == own.requires_grad
        if own.grad is not None:
            assert error(own.grad, true.grad) < 1e-5


def test_shapes_strides_and_repeated_backward():
    student, teacher = sides((36, 301, 16, 24, 0))
    targets, weight = make_targets(36, 301), torch.rand(36)
    flat = distill(student, teacher, targets=targets, token_weight=weight)
    flat.loss.backward()
    gradient = student.hidden.grad.clone()
    student.hidden.grad = None
    # (3, 12, D) views with foreign strides, of the same numbers
    strided = student.hidden.detach().t().contiguous().t().requires_grad_()
    cube = strided.view(3, 12, 16).requires_grad_()
    got = linear_distill_loss(
        cube,
        LMHead(student.weight.detach().t().contiguous().t()),
        teacher.hidden.view(3, 12, 24),
        teacher.weight,
        targets=targets.view(3, 12),
        token_weight=weight.view(3, 12),
    )
    assert [v.shape for v in got[1:]] == [(3, 12)] * 4 + [()] * 2
    torch.testing.assert_close(got.divergence.view(-1), flat.divergence)
    torch.testing.assert_close(got.log_prob.view(-1), flat.log_prob)
    torch.testing.assert_close(got.loss, flat.loss)
    got.loss.backward(retain_graph=True)
    assert error(strided.grad, gradient) < 1e-5
    with pytest.raises(RuntimeError, match="a second time"):
        got.loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_loss_is_scaled_before_it_is_rounded(backend):
    """A GradScaler's factor must reach fp32 gradients: those of fp16 would have underflown."""
    student, teacher = sides((64, 301, 16, 24, 0), torch.float16)
    want, guide = student.double(), teacher.double()
    textbook(want, guide, "forward_kl", 1.0)[0].backward()
    weight = torch.full((64,), 2.0**-20 / 64)
    (distill(student, teacher, backend=backend, token_weight=weight).loss * 2.0**20).backward()
    assert max(gradient_errors(student, want)) < 1e-3


def test_double_backward_is_an_error():
    student, teacher = sides(SHAPES[0])
    loss = distill(student, teacher).loss
    (first,) = torch.autograd.grad(loss, student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (first.square().sum() + student.weight.sum()).backward()  # torch's own part is fine


def test_no_grad_and_results_without_backward():
    student, teacher = sides(SHAPES[0])
    with torch.no_grad():
        quiet = distill(student, teacher)
    loud = distill(student, teacher)
    assert not quiet.loss.requires_grad and loud.loss.requires_grad
    assert torch.equal(quiet.loss, loud.loss)
    with torch.inference_mode():
        assert torch.equal(distill(student, teacher).loss, loud.loss)


def test_results_repeat_bit_for_bit():
    runs = []
    for _ in range(2):
        student, teacher = sides(SHAPES[2])
        got = distill(student, teacher, divergence="jsd", memory_budget=2_000_000)
        got.loss.backward()
        runs.append([*got, student.hidden.grad, student.weight.grad])
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixed", ["autocast", "dtypes"])
def test_mixed_precision(mixed, backend):
    student, teacher = sides(SHAPES[0], bias=True)
    if mixed == "autocast":  # hidden states are rounded to bf16, the fp32 head is not
        student.hidden = student.hidden.detach().bfloat16().float().requires_grad_()
        teacher.hidden = teacher.hidden.detach().bfloat16().float()
    else:
        student.hidden = student.hidden.detach().bfloat16().requires_grad_()
        teacher.weight = teacher.weight.detach().half()
    want, guide = student.double(), teacher.double()
    loss, _ = textbook(want, guide, "jsd", 1.0)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed == "autocast"):
        got = distill(student, teacher, backend=backend, divergence="jsd")
    got.loss.backward()
    assert error(got.loss, loss) < VALUE_RTOL
    errors = [error(a.grad, b.grad) for a, b in zip(student.inputs, want.inputs, strict=True)]
    assert errors[0] < RTOL[student.hidden.dtype] and max(errors[1:]) < 1e-5
