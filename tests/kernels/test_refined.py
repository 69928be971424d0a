"""What refines the teacher inside of a loss: teacher_top_p and divergence_weight."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import BACKENDS, RTOL, SMALL, VALUE_RTOL, error, gradient_errors, make_side, make_targets

from dudi_kernels import LMHead, TopKTeacher, Verbalizer, linear_distill_loss, linear_dudi_loss
from dudi_kernels.nucleus import restrict

FINITE = ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
SHAPED = {"bias": True, "softcap": 3.0, "scale": 0.7}
LENGTHS = [3, 5, 1, 6, 4, 2]  # y+, y-, y+, ...


def sides(rows=13, vocab=301, dtype=torch.float32, **style):
    student = make_side(rows, vocab, 8, dtype, **style)
    return student, make_side(rows, vocab, 12, dtype, seed=9, **style)


def true_divergence(student, teacher, name, top_p, taus=(1.0, 1.0), beta=0.3, alpha=0.2):
    """(N,) of float64 sides."""
    kept = oracle.nucleus(teacher.logits(), taus[1], top_p)
    q, p = (student.logits() / taus[0]).softmax(-1), (kept / taus[1]).softmax(-1)
    return oracle.DIVERGENCES[name](p, q, beta, alpha), kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("style", [{}, SHAPED], ids=["plain", "shaped"])
@pytest.mark.parametrize("divergence", FINITE)
def test_a_restricted_teacher(divergence, style, dtype, backend):
    student, teacher = sides(dtype=dtype, **style)
    taus = 1.5, 0.8
    got = linear_distill_loss(
        student.hidden, student.head, teacher.hidden, teacher.head, divergence=divergence,
        beta=0.3, alpha=0.2, temperature=taus[0], teacher_temperature=taus[1], teacher_top_p=0.7,
        backend=backend, memory_budget=SMALL,
    )  # fmt: skip
    got.loss.backward()
    want, guide = student.double(), teacher.double()
    true, kept = true_divergence(want, guide, divergence, 0.7, taus)
    true.mean().backward()
    assert error(got.divergence, true) < VALUE_RTOL
    assert error(got.teacher_entropy, oracle.entropy(kept)) < VALUE_RTOL
    bound = 1e-4 if divergence == "total_variation" and dtype == torch.float32 else RTOL[dtype]
    assert max(gradient_errors(student, want)) < bound


@pytest.mark.parametrize("vocab", [1, 2, 1023, 1024, 1025, 20_000])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 0.999999])
def test_the_nucleus_is_the_one_of_a_full_sort(vocab, top_p):
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=random) * torch.tensor([[0.01], [1], [3], [10], [80]])
    want = oracle.nucleus(logits.double(), 0.8, top_p)
    restrict(logits, 1 / 0.8, top_p, tile_rows=2)
    mass = want.div(0.8).softmax(-1)
    differs = (logits == -torch.inf) != (want == -torch.inf)
    assert float((mass * differs).sum(-1).max()) < 1e-6  # a token at the border, to fp32 rounding
    assert torch.equal(logits.argmax(-1), want.argmax(-1))


def test_tokens_that_tie_with_the_last_one_stay():
    logits = torch.tensor([[2.0, 1, 1, 1, 0, -torch.inf]])
    restrict(logits, 1.0, 0.5, tile_rows=1)  # the first has 0.43 of the mass, the next 0.16 each
    assert logits.tolist() == [[2.0, 1, 1, 1, -math.inf, -math.inf]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [2**28, 40_000, 26_000], ids=["whole", "pairs", "long"])
def test_three_signals_of_a_restricted_teacher(budget, backend):
    """With weights of rows, some 0, and all other signals beside."""
    segments = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    student, teacher = sides(len(segments), bias=True)
    targets = make_targets(len(segments), 301)
    weight = torch.rand(len(segments), generator=torch.Generator().manual_seed(1))
    weight[::4] = 0
    got = linear_dudi_loss(
        student.hidden, student.head, teacher.hidden, teacher.head, targets, segments,
        on_policy_weight=0.7, preference_weight=0.3, ce_weight=0.2, on_policy_divergence="jsd",
        off_policy_rows=11.0, on_policy_rows=13.0,
        divergence_weight=weight, teacher_top_p=0.8, backend=backend, memory_budget=budget,
    )  # fmt: skip
    got.loss.backward()
    want, guide = student.double(), teacher.double()
    off, _ = true_divergence(want, guide, "forward_kl", 0.8)
    on, _ = true_divergence(want, guide, "jsd", 0.8, beta=0.5)
    positive = segments % 2 == 0
    rest = oracle.dudi(
        want.logits(), None, targets, segments, weights=(0, 0, 0.3, 0.2),
        divergences=("forward_kl", "jsd"), beta=0.5, alpha=0.1, temperature=1.0,
        preference_beta=0.1, length_power=0, reference=None, denominators=(11.0, 13.0, None),
    )  # fmt: skip
    off_loss = (off * weight)[positive].sum() / 11
    on_loss = (on * weight)[~positive].sum() / 13
    loss = off_loss + 0.7 * on_loss + rest["loss"]
    loss.backward()
    assert error(got.loss, loss) < VALUE_RTOL
    assert error(got.off_policy_loss, off_loss) < VALUE_RTOL
    assert error(got.on_policy_loss, on_loss) < VALUE_RTOL
    assert error(got.divergence, torch.where(positive, off, on)) < VALUE_RTOL  # without weights
    assert max(gradient_errors(student, want)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_weight_0_may_have_an_infinite_divergence(backend):
    student, teacher = sides(6, vocab=40, bias=True)
    with torch.no_grad():
        student.bias[7] = -torch.inf
    segments, targets = torch.tensor([0, 0, 0, 1, 1, 1]), make_targets(6, 7)
    results = []
    for weight in ([0.0, 0, 0, 1, 1, 1], [1.0] * 6):
        results.append(
            linear_dudi_loss(
                student.hidden, student.head, teacher.hidden, teacher.head, targets, segments,
                on_policy_divergence="total_variation", preference_weight=0.1,
                divergence_weight=torch.tensor(weight), backend=backend,
            )
        )  # fmt: skip
    assert math.isfinite(results[0].loss.item()) and math.isinf(results[1].loss.item())
    results[0].loss.backward()
    assert all(bool(t.grad.isfinite().all()) for t in student.inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unmatched", ["bucket", "renormalize"])
def test_a_restricted_teacher_over_classes(unmatched, backend):
    """The nucleus is the teacher's own; what is left is mapped."""
    rows, vocab, other = 9, 40, 60
    student, teacher = make_side(rows, vocab, 8), make_side(rows, other, 12, seed=3)
    ids = torch.arange(0, 50)
    map_ = Verbalizer.from_coo(
        ids, ids % 30, torch.ones(50), teacher_size=other, student_size=vocab, unmatched=unmatched
    )
    got = linear_distill_loss(
        student.hidden, student.head, teacher.hidden, teacher.head, divergence="jsd",
        teacher_top_p=0.9, verbalizer=map_, backend=backend,
    )  # fmt: skip
    got.loss.backward()
    want, guide = student.double(), teacher.double()
    p = oracle.nucleus(guide.logits(), 1.0, 0.9).softmax(-1)
    mapped = torch.zeros(other, 30, dtype=torch.float64)
    mapped[ids, ids % 30] = 1.0
    p, q = p @ mapped, want.logits().softmax(-1)
    if unmatched == "bucket":
        p, q = (torch.cat([t[:, :30], 1 - t[:, :30].sum(-1, keepdim=True)], -1) for t in (p, q))
    else:
        p, q = (t[:, :30] / t[:, :30].sum(-1, keepdim=True) for t in (p, q))
    true = oracle.jsd(p.detach(), q, 0.5, 0.1)
    true.mean().backward()
    assert error(got.divergence, true) < VALUE_RTOL
    assert max(gradient_errors(student, want)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", FINITE)
def test_a_teacher_without_matched_mass_says_nothing(divergence, backend):
    """Restricted to its likeliest token, which has no class, in some rows."""
    student, teacher = make_side(5, 40, 8), make_side(5, 60, 12, seed=3)
    with torch.no_grad():
        teacher.hidden.mul_(9)
    ids = torch.arange(40)
    map_ = Verbalizer.from_coo(
        ids, ids // 2, torch.ones(40), teacher_size=60, student_size=40, unmatched="renormalize"
    )
    silent = teacher.logits().argmax(-1) >= 40
    assert 0 < int(silent.sum()) < 5
    got = linear_distill_loss(
        student.hidden, student.head, teacher.hidden, teacher.head, divergence=divergence,
        teacher_top_p=1e-3, verbalizer=map_, backend=backend,
    )  # fmt: skip
    got.loss.backward()
    assert student.hidden.grad is not None
    size = student.hidden.grad.norm(dim=1)
    assert float(got.divergence[silent].abs().max()) < 1e-6 and float(size[silent].max()) < 1e-6
    assert float(got.divergence[~silent].min()) > 0.1 and float(size[~silent].min()) > 1e-3


def test_the_whole_teacher_is_no_teacher_restricted():
    student, teacher = sides()
    inputs = student.hidden, student.head, teacher.hidden, teacher.head
    plain, restricted = linear_distill_loss(*inputs), linear_distill_loss(*inputs, teacher_top_p=1)
    assert torch.equal(plain.loss, restricted.loss)


def call(**settings):
    student, teacher = sides(6, vocab=40)
    segments = torch.tensor([0, 0, 0, 1, 1, 1])
    return linear_dudi_loss(
        student.hidden, student.head, teacher.hidden, teacher.head, make_targets(6, 40), segments,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_top_p": 0}, r"teacher_top_p must be in \[1e-06, 1\], got 0"),
        ({"teacher_top_p": 1.1}, r"teacher_top_p must be in \[1e-06, 1\], got 1.1"),
        ({"teacher_top_p": math.nan}, "teacher_top_p must be a finite number, got nan"),
        ({"teacher_top_p": 0.9}, "on_policy_divergence is infinite with teacher_top_p=0.9"),
        (
            {"teacher_top_p": 0.9, "on_policy_divergence": "jsd", "preference_weight": 1.0,
             "reference_log_prob": "teacher"},
            "reference_log_prob must not be 'teacher' with teacher_top_p=0.9",
        ),
        ({"divergence_weight": torch.ones(5)}, r"divergence_weight must have shape \(6,\), got"),
        (
            {"divergence_weight": torch.tensor([1, 1, -1.0, 1, 1, 1])},
            "divergence_weight must be finite and not negative, got -1.0 at row 2",
        ),
        (
            {"divergence_weight": torch.full((6,), math.nan)},
            "divergence_weight must be finite and not negative, got nan at row 0",
        ),
        ({"divergence_weight": [1.0] * 6}, None),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(settings, message):
    if message is None:
        with pytest.raises(TypeError, match="divergence_weight must be a tensor, got list"):
            call(**settings)
        return
    with pytest.raises(ValueError, match=message):
        call(**settings)


def test_a_top_k_teacher_is_not_restricted():
    teacher = TopKTeacher(torch.zeros(3, 1, dtype=torch.long), torch.full((3, 1), -1.0))
    with pytest.raises(ValueError, match=r"teacher_top_p must be 1 with a TopKTeacher, got 0\.5"):
        linear_distill_loss(
            torch.randn(3, 4), LMHead(torch.randn(9, 4)), teacher, teacher_top_p=0.5
        )
