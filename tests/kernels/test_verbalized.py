"""Divergences over classes of tokens, against a dense float64 `P @ M`."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import (
    BACKENDS,
    KINK_RTOL,
    RTOL,
    SMALL,
    VALUE_RTOL,
    error,
    gradient_errors,
    make_side,
    make_targets,
)

from dudi_kernels import (
    DIVERGENCES,
    Verbalizer,
    devices,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
)

BETA, ALPHA = 0.3, 0.2
ROWS, TEACHER, STUDENT, WIDTH = 19, 311, 157, 16
STYLES: list[dict] = [{}, {"bias": True, "softcap": 3.0, "scale": 0.7}]
# Triton's maps see logits, which are fp32 whatever the inputs are
TYPES = [("torch", dtype, style) for dtype in RTOL for style in STYLES]
TYPES.append(("triton", torch.float32, STYLES[1]))
UNMATCHED = ["bucket", "renormalize"]


def dense(teacher, student, unmatched="bucket"):
    """From (U, K) weights and (V, K) one-hot rows, either of which may have rows of zeros."""
    classes = torch.where(student.any(1), student.int().argmax(1), -1)
    by_class = teacher.t()
    there = by_class > 0
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), there.sum(1).cumsum(0)])
    return Verbalizer(
        teacher_size=len(teacher),
        student_size=len(student),
        num_classes=teacher.shape[1],
        indptr=indptr,
        teacher_ids=there.nonzero()[:, 1],
        weights=by_class[there].float(),
        student_class=classes,
        unmatched=unmatched,
    )


def maps(seed=0, classes=60):
    """Many to one and one to many; classes that only one side has; tokens without a class."""
    random = torch.Generator().manual_seed(seed)
    teacher = torch.zeros(TEACHER, classes)
    for token in range(TEACHER - 20):
        own = torch.randint(classes - 4, (2,), generator=random)
        teacher[token, own] = torch.tensor([0.5, 0.25 if token % 3 else 0.5])
    teacher[:, 7] = 0
    teacher[5, :] = 0
    teacher[5, classes - 1] = 1  # a class that no token of the student has
    student = torch.zeros(STUDENT, classes)
    own = torch.randint(4, classes, (STUDENT,), generator=random)
    own[own == classes - 1] = 9
    own[:40] = torch.arange(4, 44)
    student[torch.arange(STUDENT), own] = 1
    student[::11] = 0
    return teacher, student


def classes_of(p, q, teacher, student, unmatched):
    """(P, Q) over the classes that both sides have, and the bucket."""
    live = teacher.any(0) & student.any(0)
    to_teacher, to_student = teacher[:, live].double(), student[:, live].double()
    both = p @ to_teacher, q @ to_student
    rest = [1 - to_teacher.sum(1), 1 - to_student.sum(1)]
    if unmatched == "renormalize":
        return tuple(x / x.sum(-1, keepdim=True) for x in both)
    return tuple(
        torch.cat([x, (whole @ own)[:, None]], 1)
        for x, whole, own in zip(both, (p, q), rest, strict=True)
    )


def sides(dtype=torch.float32, rows=ROWS, **style):
    student = make_side(rows, STUDENT, WIDTH, dtype, **style)
    return student, make_side(rows, TEACHER, 24, dtype, seed=9, **style)


def probabilities(student, teacher, temperatures=(1.0, 1.0)):
    q = (student.logits() / temperatures[0]).softmax(-1)
    return (teacher.logits() / temperatures[1]).softmax(-1).detach(), q


@pytest.mark.parametrize("backend, dtype, style", TYPES, ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_matches_float64(divergence, unmatched, backend, dtype, style):
    teacher_map, student_map = maps()
    student, teacher = sides(dtype, **style)
    targets, weight = make_targets(ROWS, STUDENT), 0.5 + torch.rand(ROWS)
    want = student.double()
    got = linear_distill_loss(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        divergence=divergence,
        beta=BETA,
        alpha=ALPHA,
        temperature=1.4,
        teacher_temperature=0.8,
        token_weight=weight,
        targets=targets,
        ce_weight=0.4,
        verbalizer=dense(teacher_map, student_map, unmatched),
        memory_budget=SMALL,
        backend=backend,
    )
    p, q = probabilities(want, teacher.double(), (1.4, 0.8))
    both = classes_of(p, q, teacher_map, student_map, unmatched)
    values = oracle.DIVERGENCES[divergence](*both, BETA, ALPHA)
    log_prob = oracle.log_prob(want.logits(), targets)
    loss = (weight.double() * (values - 0.4 * log_prob)).sum()
    assert error(got.divergence, values) < VALUE_RTOL
    assert error(got.loss, loss) < VALUE_RTOL
    assert error(got.log_prob, log_prob) < VALUE_RTOL
    assert error(got.entropy, oracle.entropy(want.logits())) < VALUE_RTOL
    assert error(got.teacher_entropy, oracle.entropy(teacher.double().logits())) < VALUE_RTOL
    got.loss.backward()
    loss.backward()
    kink = KINK_RTOL if divergence == "total_variation" else 0
    assert max(gradient_errors(student, want)) < max(RTOL[dtype], kink)
    assert teacher.hidden.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", STYLES[1:], ids=["shaped"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_match_float64(divergence, style, backend):
    teacher_map, student_map = maps()
    student, teacher = sides(**style)
    targets = make_targets(ROWS, STUDENT)
    want = student.double()
    got = linear_distill(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        divergence=divergence,
        beta=BETA,
        alpha=ALPHA,
        temperature=1.4,
        targets=targets,
        verbalizer=dense(teacher_map, student_map),
        memory_budget=SMALL,
        backend=backend,
    )
    p, q = probabilities(want, teacher.double(), (1.4, 1.4))
    values = oracle.DIVERGENCES[divergence](
        *classes_of(p, q, teacher_map, student_map, "bucket"), BETA, ALPHA
    )
    log_prob, entropy = oracle.log_prob(want.logits(), targets), oracle.entropy(want.logits())
    for mine, other in zip(got, (values, log_prob, entropy), strict=False):
        assert error(mine, other) < VALUE_RTOL
    pulls = torch.randn(3, ROWS)
    (pulls * torch.stack(got[:3])).sum().backward()
    (pulls.double() * torch.stack([values, log_prob, entropy])).sum().backward()
    kink = KINK_RTOL if divergence == "total_variation" else 0
    assert max(gradient_errors(student, want)) < max(RTOL[torch.float32], kink)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("together", [False, True], ids=["long-pairs", "short-pairs"])
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
def test_three_signals_match_float64(style, together, backend):
    teacher_map, student_map = maps()
    student, teacher = sides(**style)
    targets = make_targets(ROWS, STUDENT)
    segments = torch.tensor([0] * 5 + [1] * 4 + [2] * 3 + [3] * 7)
    settings: dict = {"temperature": 1.3, "beta": BETA, "alpha": ALPHA, "preference_beta": 0.5}
    want = student.double()
    got = linear_dudi_loss(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        targets,
        segments,
        preference_weight=0.7,
        ce_weight=0.3,
        verbalizer=dense(teacher_map, student_map),
        memory_budget=SMALL * (20 if together else 1),
        backend=backend,
        **settings,
    )
    p, q = probabilities(want, teacher.double(), (1.3, 1.3))
    p, q = classes_of(p, q, teacher_map, student_map, "bucket")
    positive = segments % 2 == 0
    off = oracle.kl(p, q)[positive].mean()
    on = oracle.kl(q, p)[~positive].mean()
    plain = oracle.dudi(
        want.logits(),
        None,
        targets,
        segments,
        weights=(0, 0, 0.7, 0.3),
        divergences=("forward_kl", "reverse_kl"),
        length_power=0,
        reference=None,
        denominators=(None, None, None),
        **settings,
    )
    loss = off + on + plain["loss"]
    assert error(got.loss, loss) < VALUE_RTOL
    assert error(got.margins, plain["margins"]) < VALUE_RTOL
    got.loss.backward()
    loss.backward()
    assert max(gradient_errors(student, want)) < RTOL[torch.float32]


# ---- what must hold whatever the map is ----------------------------------------------------------


def losses_and_gradients(student, teacher, **settings):
    for tensor in student.inputs:
        tensor.grad = None
    got = linear_distill_loss(
        student.hidden, student.head, teacher.hidden, teacher.head, memory_budget=SMALL, **settings
    )
    got.loss.backward()
    return [got.loss, got.divergence, *(t.grad for t in student.inputs)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_identity_gives_the_same_bits(backend):
    student, teacher = make_side(ROWS, STUDENT, WIDTH), make_side(ROWS, STUDENT, 24, seed=9)
    settings = {"divergence": "jsd", "backend": backend}
    plain = losses_and_gradients(student, teacher, **settings)
    whole = losses_and_gradients(
        student, teacher, verbalizer=Verbalizer.identity(STUDENT), **settings
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "total_variation"])
@pytest.mark.parametrize("teacher_size", [STUDENT + 30, STUDENT - 30])
def test_a_prefix_is_a_slice(teacher_size, divergence):
    n = min(teacher_size, STUDENT)
    student = make_side(ROWS, STUDENT, WIDTH)
    teacher = make_side(ROWS, teacher_size, 24, seed=9)
    verbalizer = Verbalizer.prefix(teacher_size, STUDENT)
    got = losses_and_gradients(student, teacher, verbalizer=verbalizer, divergence=divergence)
    cut, short = make_side(ROWS, STUDENT, WIDTH), make_side(ROWS, teacher_size, 24, seed=9)
    weight = cut.weight
    cut.weight, short.weight = weight[:n], short.weight[:n]
    loss = linear_distill_loss(
        cut.hidden, cut.head, short.hidden, short.head, divergence=divergence
    ).loss
    wanted = torch.autograd.grad(loss, (cut.hidden, weight))
    assert error(got[0], loss) < VALUE_RTOL
    assert max(error(a, b) for a, b in zip(got[2:], wanted, strict=True)) < RTOL[torch.float32]


def test_classes_of_one_token_equal_no_classes():
    """Of any numbering: nothing but the order of sums tells them apart."""
    student, teacher = make_side(ROWS, STUDENT, WIDTH), make_side(ROWS, STUDENT, 24, seed=9)
    plain = losses_and_gradients(student, teacher)
    number = torch.randperm(STUDENT)
    whole = Verbalizer(
        teacher_size=STUDENT,
        student_size=STUDENT,
        num_classes=STUDENT,
        indptr=torch.arange(STUDENT + 1),
        teacher_ids=number.argsort(),
        weights=torch.ones(STUDENT),
        student_class=number,
    )
    found = losses_and_gradients(student, teacher, verbalizer=whole)
    assert max(error(a, b) for a, b in zip(found, plain, strict=True)) < 1e-6


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_permuted_vocabularies_give_permuted_gradients(unmatched):
    teacher_map, student_map = maps()
    student, teacher = sides()
    plain = losses_and_gradients(
        student, teacher, verbalizer=dense(teacher_map, student_map, unmatched)
    )
    of_teacher, of_student = torch.randperm(TEACHER), torch.randperm(STUDENT)
    with torch.no_grad():
        teacher.weight.copy_(teacher.weight[of_teacher])
        student.weight.copy_(student.weight[of_student])
    permuted = dense(teacher_map[of_teacher], student_map[of_student], unmatched)
    *found, weight = losses_and_gradients(student, teacher, verbalizer=permuted)
    assert max(error(a, b) for a, b in zip(found, plain, strict=False)) < 1e-5
    assert error(weight, plain[-1][of_student]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(backend):
    verbalizer = dense(*maps())
    runs = [losses_and_gradients(*sides(), verbalizer=verbalizer, backend=backend) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_frozen_head_and_weights_of_zero():
    student, teacher = sides()
    student.weight.requires_grad_(False)
    weight = torch.ones(ROWS)
    weight[3] = 0
    got = linear_distill_loss(
        student.hidden, student.head, teacher.hidden, teacher.head,
        token_weight=weight, verbalizer=dense(*maps()),
    )  # fmt: skip
    got.loss.backward()
    assert student.weight.grad is None and not student.hidden.grad[3].any()
    assert student.hidden.grad[4].any()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    student, teacher = sides(rows=rows)
    got = losses_and_gradients(student, teacher, verbalizer=dense(*maps()))
    assert got[1].shape == (rows,) and all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("function", [linear_distill_loss, linear_distill])
def test_under_compile(function):
    verbalizer = dense(*maps())
    student, teacher = sides()

    def loss(hidden, weight):
        got = function(
            hidden, weight, teacher.hidden, teacher.head, divergence="jsd", verbalizer=verbalizer
        )
        return got[0].sum()

    inputs = (student.hidden, student.weight)
    plain = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


# ---- refusals ------------------------------------------------------------------------------------

ONE_SIDED = Verbalizer.from_coo([0, 1], [0, 1], [1.0, 1.0], teacher_size=2, student_size=STUDENT)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"verbalizer": "prefix"}, TypeError, "verbalizer must be a Verbalizer or None, got str"),
        (
            {"verbalizer": Verbalizer.identity(STUDENT)},
            ValueError,
            f"verbalizer must be for a teacher_head of {TEACHER} rows, got one for {STUDENT}",
        ),
        (
            {"verbalizer": Verbalizer.prefix(TEACHER, STUDENT + 1)},
            ValueError,
            f"verbalizer must be for a student_head of {STUDENT} rows, got one for {STUDENT + 1}",
        ),
        (
            {"verbalizer": dense(*maps()).to("meta")},
            ValueError,
            "verbalizer must be on cpu as student_hidden is",
        ),
        (
            {"verbalizer": dense(*maps()), "gradient_tolerance": 0.1},
            ValueError,
            "gradient_tolerance must be 0 with a verbalizer, got 0.1",
        ),
        ({}, ValueError, "teacher_head must have the student's vocabulary"),
    ],
    ids=str,
)
def test_refused(change, kind, message):
    student, teacher = sides()
    with pytest.raises(kind, match=message):
        linear_distill_loss(student.hidden, student.head, teacher.hidden, teacher.head, **change)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [linear_distill_loss, linear_distill])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_reverse_kl"])
def test_a_bucket_without_any_mass_of_the_teacher(divergence, function, backend):
    """In every chunk, whatever the chunk before left in the buffers."""
    _, teacher = sides()
    ids = torch.arange(TEACHER)
    small = make_side(ROWS, TEACHER + 40, WIDTH)  # a student with tokens that the teacher lacks
    map_ = Verbalizer.from_coo(
        ids, ids, torch.ones(TEACHER), teacher_size=TEACHER, student_size=TEACHER + 40
    )
    got = function(
        small.hidden, small.head, teacher.hidden, teacher.head, divergence=divergence, beta=BETA,
        alpha=ALPHA, verbalizer=map_, memory_budget=SMALL, backend=backend,
    )  # fmt: skip
    got.divergence.mean().backward() if function is linear_distill else got.loss.backward()
    want = small.double()
    p, q = probabilities(want, teacher.double())
    p = torch.cat([p, torch.zeros(ROWS, 1)], 1)
    q = torch.cat([q[:, :TEACHER], q[:, TEACHER:].sum(1, keepdim=True)], 1)
    true = oracle.DIVERGENCES[divergence](p, q, BETA, ALPHA)
    true.mean().backward()
    assert error(got.divergence, true) < VALUE_RTOL
    assert max(gradient_errors(small, want)) < 1e-5


def test_an_infinite_divergence_is_refused():
    student, teacher = make_side(ROWS, STUDENT, WIDTH), make_side(ROWS, 2, 24, seed=9)
    arguments = (student.hidden, student.head, teacher.hidden, teacher.head)
    for divergence in ("reverse_kl", "jeffreys"):
        with pytest.raises(ValueError, match=r"divergence is infinite .* unmatched='renormalize'"):
            linear_distill_loss(*arguments, divergence=divergence, verbalizer=ONE_SIDED)
    assert linear_distill_loss(*arguments, verbalizer=ONE_SIDED).loss.isfinite()


def test_classes_are_made_before_a_graph_is_captured(monkeypatch):
    student, teacher = sides()
    arguments = (student.hidden, student.head, teacher.hidden, teacher.head)
    known, new = dense(*maps()), dense(*maps())
    wanted = linear_distill_loss(*arguments, verbalizer=known).loss
    monkeypatch.setattr(devices, "capturing", lambda device: True)
    with pytest.raises(ValueError, match="verbalizer must have its classes made before"):
        linear_distill_loss(*arguments, verbalizer=new)
    assert torch.equal(linear_distill_loss(*arguments, verbalizer=known).loss, wanted)


def test_the_teacher_is_no_reference_in_another_vocabulary():
    student, teacher = sides()
    with pytest.raises(ValueError, match="reference_log_prob must not be 'teacher'"):
        linear_dudi_loss(
            student.hidden, student.head, teacher.hidden, teacher.head,
            make_targets(ROWS, STUDENT), torch.arange(ROWS) // 10, preference_weight=1.0,
            reference_log_prob="teacher", verbalizer=dense(*maps()),
        )  # fmt: skip
