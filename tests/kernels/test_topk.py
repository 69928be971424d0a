"""A teacher known by its k likeliest tokens: classes of one token and a bucket, against float64."""

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

from dudi_kernels import DIVERGENCES, TopKTeacher, likeliest_tokens, linear_distill_loss

BETA, ALPHA = 0.3, 0.2
ROWS, VOCAB, WIDTH, K = 19, 1031, 16, 7
STYLES: list[dict] = [{}, {"bias": True, "softcap": 3.0, "scale": 0.7}]


def top_of(logits, k=K):
    log_probs, ids = logits.detach().log_softmax(-1).topk(k, -1)
    return TopKTeacher(ids, log_probs.float())


def classes(logits, teacher):
    """(p, q) over k + 1 classes, float64."""
    p = teacher.log_probs.double().exp()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    return p, oracle.bucketed(logits.softmax(-1), teacher.ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(divergence, style, dtype, backend):
    student = make_side(ROWS, VOCAB, WIDTH, dtype, **style)
    teacher = top_of(make_side(ROWS, VOCAB, 24, seed=9).logits())
    targets, weight = make_targets(ROWS, VOCAB), 0.5 + torch.rand(ROWS)
    targets[0] = teacher.ids[0, 2]  # a target among the top tokens
    want = student.double()
    got = linear_distill_loss(
        student.hidden,
        student.head,
        teacher,
        divergence=divergence,
        beta=BETA,
        alpha=ALPHA,
        token_weight=weight,
        targets=targets,
        ce_weight=0.4,
        memory_budget=SMALL if dtype == torch.float32 else 20 * SMALL,
        backend=backend,
    )
    logits = want.logits()
    p, q = classes(logits, teacher)
    values = oracle.DIVERGENCES[divergence](p, q, BETA, ALPHA)
    if divergence == "adaptive_kl":
        values = oracle.adaptive_kl(p, q, bucket=True)
    log_prob = oracle.log_prob(logits, targets)
    loss = (weight.double() * (values - 0.4 * log_prob)).sum()
    assert error(got.loss, loss) < VALUE_RTOL
    assert error(got.divergence, values) < VALUE_RTOL
    assert error(got.log_prob, log_prob) < VALUE_RTOL
    assert error(got.entropy, oracle.entropy(logits)) < VALUE_RTOL
    got.loss.backward()
    loss.backward()
    kink = KINK_RTOL if divergence == "total_variation" else 0
    assert max(gradient_errors(student, want)) < max(RTOL[dtype], kink)


def test_a_faint_bucket_is_exact():
    """Its mass is a log-sum-exp of its own, not 1 minus nearly 1."""
    student = make_side(ROWS, VOCAB, WIDTH)
    with torch.no_grad():
        student.hidden.mul_(6)  # the top tokens have all but 1e-6 of the mass and less
    teacher = top_of(student.logits(), k=60)
    want = student.double()
    got = linear_distill_loss(student.hidden, student.head, teacher, divergence="reverse_kl")
    _, q = classes(want.logits(), teacher)
    assert float(q[:, -1].detach().median()) < 1e-4
    lp = teacher.log_probs.double()
    tail = (1 - lp.exp().sum(-1, keepdim=True)).clamp(min=0).log()
    values = (q * (q.log() - torch.cat([lp, tail], -1).clamp(min=-1e38))).sum(-1)
    finite = values.isfinite() & (values < 1e3)
    torch.testing.assert_close(
        got.divergence[finite].double(), values[finite], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_hold_under_a_softcap(backend):
    """As if the masked tokens were not there, but for one of the teacher's."""
    student = make_side(ROWS, VOCAB, WIDTH, bias=True, softcap=4.0)
    teacher = top_of(make_side(ROWS, VOCAB, 24, seed=9).logits())
    masked = torch.arange(VOCAB) % 2 == 0
    with torch.no_grad():
        student.bias[masked] = -torch.inf
    want = student.double()
    settings = {"divergence": "jsd", "backend": backend, "memory_budget": SMALL}
    got = linear_distill_loss(student.hidden, student.head, teacher, **settings)
    logits = want.logits().masked_fill(masked, -torch.inf)
    p, q = classes(logits, teacher)
    loss = oracle.DIVERGENCES["jsd"](p, q, 0.5, 0.1).mean()
    assert error(got.loss, loss) < VALUE_RTOL
    got.loss.backward()
    loss.backward()
    assert error(student.hidden.grad, want.hidden.grad.nan_to_num()) < 1e-5
    assert all(t.grad.isfinite().all() for t in student.inputs)


def test_all_tokens_are_no_restriction():
    student, teacher = make_side(ROWS, 61, WIDTH), make_side(ROWS, 61, 24, seed=9)
    sides = (student.hidden, student.head)
    whole = linear_distill_loss(*sides, teacher.hidden, teacher.head)
    known = linear_distill_loss(*sides, top_of(teacher.logits(), k=61))
    torch.testing.assert_close(known.divergence, whole.divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(known.teacher_entropy, whole.teacher_entropy, rtol=1e-4, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(known.loss, student.inputs),
        torch.autograd.grad(whole.loss, student.inputs),
        strict=True,
    ):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_it_says_nothing_of(divergence):
    """As if their weight were 0, but for the mean over rows."""
    student = make_side(ROWS, VOCAB, WIDTH)
    teacher = top_of(make_side(ROWS, VOCAB, 24, seed=9).logits())
    known = torch.tensor([i for i in range(ROWS) if i not in (0, 7, 18)])
    some = TopKTeacher(teacher.ids[known], teacher.log_probs[known]).spread(known, ROWS)
    settings = {"divergence": divergence, "targets": make_targets(ROWS, VOCAB), "ce_weight": 0.0}
    weight = torch.zeros(ROWS).index_fill(0, known, 1 / ROWS)
    got = linear_distill_loss(student.hidden, student.head, some, **settings)
    want = linear_distill_loss(
        student.hidden, student.head, teacher, token_weight=weight, **settings
    )
    assert not got.divergence[[0, 7, 18]].any() and not got.teacher_entropy[[0, 7, 18]].any()
    assert torch.equal(got.divergence[known], want.divergence[known])
    assert error(got.entropy, want.entropy) < 1e-6 and error(got.log_prob, want.log_prob) < 1e-6
    assert error(got.loss, want.loss) < 1e-6
    for a, b in zip(
        torch.autograd.grad(got.loss, student.inputs),
        torch.autograd.grad(want.loss, student.inputs),
        strict=True,
    ):
        assert error(a, b) < 1e-6


def test_ignored_rows_and_no_rows():
    student = make_side(ROWS, VOCAB, WIDTH)
    teacher = top_of(make_side(ROWS, VOCAB, 24, seed=9).logits())
    targets = make_targets(ROWS, VOCAB)
    targets[3] = -100
    with torch.no_grad():
        student.hidden[3] = torch.nan
    got = linear_distill_loss(student.hidden, student.head, teacher, targets=targets)
    got.loss.backward()
    assert got.divergence[3] == 0 and all(t.grad.isfinite().all() for t in student.inputs)
    none = make_side(0, VOCAB, WIDTH)
    empty = TopKTeacher(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
    loss = linear_distill_loss(none.hidden, none.head, empty).loss
    loss.backward()
    assert loss == 0 and not none.weight.grad.any()


@pytest.mark.parametrize(
    ("ids", "log_probs", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), -1.0), "a token twice, row 0"),
        (torch.arange(8).view(4, 2), torch.zeros(4, 2), "row 0 sums to 2"),
        (torch.arange(8).view(4, 2), torch.full((4, 2), torch.nan), "row 0 sums to nan"),
        (torch.arange(8).view(4, 2), torch.zeros(4, 3), r"one shape \(..., k\)"),
    ],
)
def test_bad_teachers(ids, log_probs, message):
    with pytest.raises(ValueError, match=message):
        TopKTeacher(ids, log_probs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 2.0}, "temperature must be 1 with a TopKTeacher"),
        ({"teacher_head": torch.zeros(VOCAB, 4)}, "teacher_head must not be given"),
        ({"student_hidden": torch.zeros(3, WIDTH)}, "must have 3 rows"),
        ({"student_head": torch.zeros(9, WIDTH)}, r"ids must be in \[0, 9\)"),
    ],
)
def test_bad_calls(change, message):
    student = make_side(ROWS, VOCAB, WIDTH)
    given = {
        "student_hidden": student.hidden,
        "student_head": student.head,
        "teacher_hidden": top_of(make_side(ROWS, VOCAB, 24, seed=9).logits()),
    }
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(**(given | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
def test_likeliest_tokens_are_those_of_the_dense_logits(style, backend):
    side = make_side(ROWS, VOCAB, WIDTH, **style)
    got = likeliest_tokens(side.hidden, side.head, K, backend=backend, memory_budget=SMALL)
    want = side.double().logits().log_softmax(-1).topk(K)
    assert torch.equal(got.ids, want.indices)
    assert error(got.log_probs, want.values) < VALUE_RTOL
    none = likeliest_tokens(side.hidden[:0], side.head, 2, backend=backend)
    assert none.ids.shape == (0, 2)
    with pytest.raises(ValueError, match=f"k must be at most the head's {VOCAB} rows"):
        likeliest_tokens(side.hidden, side.head, VOCAB + 1)


def test_all_tokens_of_a_head_are_the_head():
    student, teacher = make_side(ROWS, 61, WIDTH), make_side(ROWS, 61, 24, seed=9)
    known = likeliest_tokens(teacher.hidden, teacher.head, 61)
    whole = linear_distill_loss(student.hidden, student.head, teacher.hidden, teacher.head)
    got = linear_distill_loss(student.hidden, student.head, known)
    assert error(got.loss, whole.loss) < VALUE_RTOL
