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
