"""linear_dudi_loss against a textbook composition of the three signals."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import (
    BACKENDS,
    KINK_RTOL,
    RTOL,
    VALUE_RTOL,
    error,
    gradient_errors,
    make_side,
    make_targets,
)

from dudi_kernels import (
    TopKTeacher,
    linear_cross_entropy,
    linear_distill_loss,
    linear_dudi_loss,
)
from dudi_kernels.plan import Plan
from dudi_kernels.preference import PREFERENCES, Packing
from dudi_kernels.prepare import pick_backend
from dudi_kernels.three_signals import _groups

VOCAB = 301
LENGTHS = [3, 5, 1, 9, 7, 2, 4, 6]  # y+, y-, y+, ...
BUDGETS = {"whole": 2**28, "pairs": 60_000, "long": 26_000}  # long: pairs of several chunks
WEIGHTS = [(1.0, 0.7, 0.3, 0.2), (1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.5, 1.0), (0.0, 0.8, 0.4, 0.0)]
STYLES: list[dict] = [{}, {"bias": True, "softcap": 3.0, "scale": 0.7}]
PARTS = ("off_policy_loss", "on_policy_loss", "preference_loss", "ce_loss")
SEQUENCES = ("margins", "log_probs", "reference_log_probs")


def make(lengths=LENGTHS, dtype=torch.float32, **style):
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    student = make_side(len(segments), VOCAB, 8, dtype, **style)
    teacher = make_side(len(segments), VOCAB, 12, dtype, seed=9, **style)
    return student, teacher, make_targets(len(segments), VOCAB), segments


def dudi(student, teacher, targets, segments, **settings):
    guide = (teacher, None)
    if not isinstance(teacher, TopKTeacher):
        guide = (teacher.hidden, teacher.head)
    return linear_dudi_loss(student.hidden, student.head, *guide, targets, segments, **settings)


def compare(
    problem,
    rtol,
    *,
    weights,
    reference,
    memory_budget=2**28,
    backend="auto",
    row_weight=None,
    **settings,
):
    student, teacher, targets, segments = problem
    known = isinstance(teacher, TopKTeacher)
    options = {
        "divergences": ("jsd", "reverse_kl"),
        "beta": 0.3,
        "alpha": 0.2,
        "temperature": 1.0,
        "preference_beta": 0.2,
        "length_power": 0,
        "denominators": (None, None, None),
        "kind": "sigmoid",
        "margin": 0.0,
        "samples": 1,
        **settings,
    }
    off, on, pairs = options["denominators"]
    got = dudi(
        *problem,
        **dict(
            zip(
                ("off_policy_weight", "on_policy_weight", "preference_weight", "ce_weight"),
                weights,
                strict=True,
            )
        ),
        off_policy_divergence=options["divergences"][0],
        on_policy_divergence=options["divergences"][1],
        beta=options["beta"],
        alpha=options["alpha"],
        temperature=options["temperature"],
        preference_beta=options["preference_beta"],
        preference_length_power=options["length_power"],
        reference_log_prob=reference,
        preference_loss=options["kind"],
        preference_margin=options["margin"],
        num_generations=options["samples"],
        divergence_weight=row_weight,
        off_policy_rows=off,
        on_policy_rows=on,
        pairs=pairs,
        memory_budget=memory_budget,
        backend=backend,
    )
    got.loss.backward()
    want = student.double()
    true = oracle.dudi(
        want.logits(),
        None if known else teacher.double().logits(),
        targets,
        segments,
        weights=weights,
        reference=None if reference == "teacher" and not weights[2] else reference,
        top=(teacher.ids, teacher.log_probs) if known else None,
        row_weight=row_weight,
        **options,
    )
    true["loss"].backward()
    assert error(got.loss, true["loss"]) < VALUE_RTOL
    used = [name for name, weight in zip(PARTS, weights, strict=True) if weight]
    for name in (*used, *SEQUENCES):
        assert error(getattr(got, name), true[name]) < VALUE_RTOL, name
    assert error(got.log_prob, oracle.log_prob(want.logits(), targets)) < VALUE_RTOL
    assert error(got.entropy, oracle.entropy(want.logits())) < VALUE_RTOL
    assert all(not v.requires_grad and v.dtype == torch.float32 for v in got[1:])
    assert max(gradient_errors(student, want)) < rtol
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("reference", ["teacher", "tensor", None])
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
def test_matches_the_textbook(style, reference, weights, budget, backend):
    problem = make(**style)
    if reference == "tensor":
        reference = -torch.rand(len(LENGTHS)) * 30
    compare(
        problem,
        1e-5,
        weights=weights,
        reference=reference,
        memory_budget=budget,
        backend=backend,
        temperature=1.6 if style else 1.0,
        length_power=1 if style else 0,
        denominators=(40.0, 50.0, 9.0) if style else (None, None, None),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize(
    "divergences", list(itertools.pairwise([*oracle.DIVERGENCES, "forward_kl"])), ids="-".join
)
def test_divergences_and_dtypes(divergences, dtype, backend):
    compare(
        make(dtype=dtype),
        max(RTOL[dtype], KINK_RTOL if "total_variation" in divergences else 0),
        weights=(1.0, 0.7, 0.3, 0.2),
        reference="teacher",
        divergences=divergences,
        memory_budget=60_000,
        backend=backend,
    )


def test_only_given_responses():
    """Without samples the odd segments have no rows, the last one included."""
    problem = make([3, 0, 4, 0, 5, 0])
    got = compare(problem, 1e-5, weights=(1.0, 1.0, 0.0, 0.5), reference=None)
    assert got.on_policy_loss == 0
    assert got.margins.shape == (3,) and got.log_probs.shape == (6,)
    assert not got.log_probs[1::2].any()
    short = dudi(*problem, reference_log_prob=-torch.ones(5))  # sums over segments, the last unseen
    assert short.reference_log_probs.tolist() == [-1, -1, -1, -1, -1, 0]


def test_it_is_the_sum_of_the_single_losses():
    student, teacher, targets, segments = make()
    even = segments % 2 == 0
    three = dudi(student, teacher, targets, segments, ce_weight=0.3)
    off = linear_distill_loss(
        student.hidden[even], student.head, teacher.hidden[even], teacher.head
    )
    on = linear_distill_loss(
        student.hidden[~even],
        student.head,
        teacher.hidden[~even],
        teacher.head,
        divergence="reverse_kl",
    )
    ce = linear_cross_entropy(student.hidden[even], student.head, targets[even])
    torch.testing.assert_close(three.loss, off.loss + on.loss + 0.3 * ce, rtol=1e-5, atol=0)
    torch.testing.assert_close(three.divergence[even], off.divergence)
    torch.testing.assert_close(three.divergence[~even], on.divergence)


def test_no_teacher_where_nothing_needs_one():
    student, _, targets, segments = make()
    got = linear_dudi_loss(
        student.hidden,
        student.head,
        None,
        None,
        targets,
        segments,
        off_policy_weight=0,
        on_policy_weight=0,
        ce_weight=1,
        preference_weight=0.1,
    )
    even = segments % 2 == 0
    want = linear_cross_entropy(student.hidden[even], student.head, targets[even])
    torch.testing.assert_close(got.ce_loss, want)
    assert not got.divergence.any() and not got.teacher_entropy.any()
    got.loss.backward()
    assert student.hidden.grad[~even].any()  # by the preference


def test_chunks_hold_whole_pairs():
    segments = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    packing = Packing(segments, 8, [0, 3, 8, 9, 18, 25, 27, 31, 37])
    assert _groups(packing, Plan(100, 1, 100), True) == [[(0, 37)]]
    assert _groups(packing, Plan(18, 1, 18), True) == [[(0, 18)], [(18, 27)], [(27, 37)]]
    assert _groups(packing, Plan(9, 1, 9), True) == [
        [(0, 8)],
        [(8, 17), (17, 18)],
        [(18, 27)],
        [(27, 36), (36, 37)],
    ]
    assert _groups(packing, Plan(9, 1, 10), True) == [[(0, 8)], [(8, 18)], [(18, 27)], [(27, 37)]]
    assert _groups(packing, Plan(30, 1, 40), False) == [[(0, 19)], [(19, 37)]]


def test_chunks_hold_whole_prompts():
    packing = Packing(torch.zeros(37), 8, [0, 3, 8, 9, 18, 25, 27, 31, 37], group=4)
    assert _groups(packing, Plan(20, 1, 20), True) == [[(0, 18)], [(18, 37)]]
    assert _groups(packing, Plan(18, 1, 18), True) == [[(0, 18)], [(18, 36), (36, 37)]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PREFERENCES)
@pytest.mark.parametrize("budget", [2**28, 26_000], ids=["whole", "long"])
def test_kinds_of_preference(kind, budget, backend):
    """Hinge has pairs on both sides of its kink."""
    got = compare(
        make(bias=True), 1e-5, weights=(0.0, 0.5, 1.0, 0.1), reference=-torch.rand(8) * 60,
        kind=kind, margin=0.3, preference_beta=2.0, length_power=1, memory_budget=budget,
        backend=backend,
    )  # fmt: skip
    z = 2 * got.margins - 0.3
    assert 0 < int((z < 1).sum()) < len(z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", ["teacher", "tensor", None])
@pytest.mark.parametrize("budget", [2**28, 60_000, 26_000], ids=["whole", "prompts", "long"])
def test_several_samples_of_a_prompt(reference, budget, backend):
    if reference == "tensor":
        reference = -torch.rand(len(LENGTHS)) * 30
    compare(
        make(), 1e-5, weights=(1.0, 0.7, 0.3, 0.2), reference=reference, samples=3,
        denominators=(20.0, 40.0, 9.0), memory_budget=budget, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("kind", PREFERENCES)
def test_a_masked_target_pulls_at_nothing(kind):
    """Its pair's loss is infinite, its gradient finite."""
    student, teacher, targets, segments = make(bias=True)
    with torch.no_grad():
        student.bias[targets[5]] = -torch.inf
    got = dudi(student, teacher, targets, segments, preference_weight=0.5, preference_loss=kind)
    got.loss.backward()
    assert all(bool(t.grad.isfinite().all()) for t in student.inputs)


def test_a_pair_count_of_whole_prompts():
    problem = make()
    with pytest.raises(ValueError, match="num_pairs must be a multiple of num_generations=3"):
        dudi(*problem, num_generations=3, num_pairs=8)
    with pytest.raises(ValueError, match="num_generations must be at least 1, got 0"):
        dudi(*problem, num_generations=0)
    with pytest.raises(ValueError, match="preference_loss must be one of sigmoid, hinge, ipo, got"):
        dudi(*problem, preference_loss="dpo")
    got = dudi(*problem, num_generations=3, num_pairs=9)
    assert got.margins.shape == (9,) and got.log_probs.shape == (12,)


def test_no_rows_and_three_dimensions():
    student, teacher, targets, segments = make([0, 0])
    got = dudi(student, teacher, targets, segments, preference_weight=0.5, ce_weight=1.0)
    got.loss.backward()
    assert got.loss == 0 and got.margins.shape == (0,)
    assert not student.weight.grad.any()

    student, teacher, targets, segments = make([4, 4, 4, 4])
    flat = dudi(student, teacher, targets, segments)
    cube = linear_dudi_loss(
        student.hidden.view(4, 4, -1),
        student.weight,
        teacher.hidden.view(4, 4, -1),
        teacher.weight,
        targets.view(4, 4),
        segments.view(4, 4),
    )
    assert cube.divergence.shape == cube.entropy.shape == (4, 4)
    torch.testing.assert_close(cube.loss, flat.loss)


def test_a_target_that_both_mask_leaves_gradients_finite():
    student, teacher, targets, segments = make(bias=True)
    with torch.no_grad():
        student.bias[targets[0]] = -torch.inf
        teacher.bias[targets[0]] = -torch.inf
    got = dudi(
        student, teacher, targets, segments, preference_weight=1.0, reference_log_prob="teacher"
    )
    got.loss.backward()
    assert not got.loss.isfinite()  # inf - inf: the pair has no margin
    assert all(t.grad.isfinite().all() for t in student.inputs)


# ---- a teacher known by its likeliest tokens -----------------------------------------------------

SILENT = [1, 10, 20]  # rows of y+, y- and a whole sequence's last


def likeliest(k=7, **more):
    """The problem with such a teacher, which says nothing of some rows."""
    student, teacher, targets, segments = make(**more)
    log_probs, ids = teacher.logits().detach().float().log_softmax(-1).topk(k)
    known = torch.ones(len(targets), dtype=torch.bool)
    known[SILENT] = False
    rows = known.nonzero()[:, 0]
    guide = TopKTeacher(ids[rows], log_probs[rows]).spread(rows, len(targets))
    targets[::3] = ids[::3, 2]  # some among its tokens
    return student, guide, targets, segments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("style", STYLES, ids=["plain", "shaped"])
def test_likeliest_tokens_match_the_textbook(style, weights, budget, backend):
    got = compare(
        likeliest(**style),
        1e-5,
        weights=weights,
        reference=-torch.rand(len(LENGTHS)) * 30,
        memory_budget=budget,
        backend=backend,
        length_power=1 if style else 0,
        denominators=(40.0, 50.0, 9.0) if style else (None, None, None),
        row_weight=torch.rand(sum(LENGTHS)) if style else None,
    )
    assert not got.divergence[SILENT].any() and not got.teacher_entropy[SILENT].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize(
    "divergences", list(itertools.pairwise([*oracle.DIVERGENCES, "forward_kl"])), ids="-".join
)
def test_likeliest_tokens_in_divergences_and_dtypes(divergences, dtype, backend):
    compare(
        likeliest(dtype=dtype),
        max(RTOL[dtype], KINK_RTOL if "total_variation" in divergences else 0),
        weights=(1.0, 0.7, 0.3, 0.2),
        reference=None,
        divergences=divergences,
        samples=3,
        memory_budget=60_000,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_are_the_whole_teacher(backend):
    """Nothing is left for the bucket."""
    student, teacher, targets, segments = make(bias=True)
    log_probs, ids = teacher.logits().detach().float().log_softmax(-1).topk(VOCAB)
    settings = {"preference_weight": 0.3, "ce_weight": 0.2, "backend": backend}
    whole = dudi(student, teacher, targets, segments, **settings)
    known = dudi(student, TopKTeacher(ids, log_probs), targets, segments, **settings)
    for name, a, b in zip(whole._fields, known, whole, strict=True):
        assert error(a, b) < VALUE_RTOL, name
    for a, b in zip(
        torch.autograd.grad(known.loss, student.inputs),
        torch.autograd.grad(whole.loss, student.inputs),
        strict=True,
    ):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_likeliest_tokens_take_one_sweep(backend, monkeypatch):
    student, guide, targets, segments = likeliest()
    module = pick_backend(backend, targets.device)
    rows, made = [], module.project

    def project(side, out):
        rows.append(len(out))
        return made(side, out)

    monkeypatch.setattr(module, "project", project)
    dudi(student, guide, targets, segments, preference_weight=0.3, ce_weight=0.2, backend=backend)
    assert rows == [sum(LENGTHS)]


@pytest.mark.parametrize(
    ("backend", "inside"), [("torch", True), ("torch", False), ("triton", True)]
)
def test_a_near_certain_target_keeps_its_gradient(inside, backend):
    """1 - q of it is not made of 1 and q, be it among the teacher's tokens or not. (Outside of them
    Triton's log-sum-exp, in fp32, has lost it.)"""
    student, _, targets, segments = make(bias=True)
    targets.fill_(5)
    with torch.no_grad():
        student.bias[5] = 24.0
    known = torch.full((len(targets), 1), 5 if inside else 6)
    guide = TopKTeacher(known, torch.full(known.shape, -0.5))
    weights = {"off_policy_weight": 1e-18, "on_policy_weight": 0.0, "ce_weight": 1.0}
    dudi(student, guide, targets, segments, backend=backend, **weights).loss.backward()
    want = student.double()
    own = oracle.log_prob(want.logits(), targets)
    assert float(own.detach().expm1().abs().median()) < 1e-6
    given = segments % 2 == 0
    (-own[given].mean()).backward()
    for a, b in zip(student.hidden.grad[given], want.hidden.grad[given], strict=True):
        assert error(a, b) < 1e-4


def test_likeliest_tokens_that_nothing_asks_for_are_not_read():
    student, guide, targets, segments = likeliest()
    wrong = TopKTeacher(guide.ids + VOCAB, guide.log_probs)
    settings = {"off_policy_weight": 0, "on_policy_weight": 0, "ce_weight": 1.0}
    got = dudi(student, wrong, targets, segments, **settings)
    assert got.loss == dudi(student, guide, targets, segments, **settings).loss
    assert not got.divergence.any() and not got.teacher_entropy.any()


def test_no_rows_of_likeliest_tokens():
    student, _, targets, segments = make([0, 0])
    guide = TopKTeacher(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
    got = dudi(student, guide, targets, segments, preference_weight=0.5, ce_weight=1.0)
    got.loss.backward()
    assert got.loss == 0 and not student.weight.grad.any()
