"""Each wrong argument gets an error that names it, what was wanted and what was given."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dudi_kernels import (
    LMHead,
    LoRA,
    TopKTeacher,
    Verbalizer,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
    plan_memory,
    sequence_log_prob,
)
from dudi_kernels.scalars import POWERS, SCALES, SHARES, TEMPERATURES

N, V, D, E = 6, 20, 4, 5
TOP = TopKTeacher(torch.zeros(N, 1).long(), torch.zeros(N, 1))


def arguments() -> dict:
    return {
        "student_hidden": torch.randn(N, D),
        "student_head": torch.randn(V, D),
        "teacher_hidden": torch.randn(N, E),
        "teacher_head": torch.randn(V, E),
        "targets": torch.arange(N),
    }


def refuses(function, given: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(**given)


DISTILL = [
    ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a tensor, got list"),
    ({"student_hidden": torch.randn(D)}, ValueError, "student_hidden must have shape (..., D)"),
    (
        {"student_hidden": torch.randn(N, 3)},
        ValueError,
        "student_hidden must have width 4 as student_head has, got 3",
    ),
    (
        {"student_hidden": torch.randn(N, D).double()},
        TypeError,
        "student_hidden must be float32, bfloat16 or float16, got torch.float64",
    ),
    (
        {"student_hidden": torch.randn(N, D, device="meta")},
        ValueError,
        "student_hidden must be on cpu as student_head is, got meta",
    ),
    ({"student_head": "lm_head"}, TypeError, "student_head must be an LMHead or a weight tensor"),
    (
        {"teacher_hidden": torch.randn(5, E)},
        ValueError,
        "teacher_hidden must have 6 rows as student_hidden, got 5",
    ),
    (
        {"student_hidden": torch.randn(2, 3, D), "teacher_hidden": torch.randn(3, 2, E)},
        ValueError,
        "teacher_hidden must have the leading shape (2, 3) of student_hidden or be flat, "
        "got (3, 2)",
    ),
    (
        {
            "student_hidden": torch.randn(2, 3, D),
            "teacher_hidden": TopKTeacher(torch.zeros(3, 2, 1).long(), torch.zeros(3, 2, 1)),
            "teacher_head": None,
        },
        ValueError,
        "the TopKTeacher must have the leading shape (2, 3) of student_hidden",
    ),
    (
        {"teacher_head": torch.randn(24, E)},
        ValueError,
        "student_head has 20 rows, teacher_head 24. If the tokenizer is the same",
    ),
    ({"divergence": "forwad_kl"}, ValueError, "got 'forwad_kl'; did you mean 'forward_kl'?"),
    ({"divergence": 3}, ValueError, "divergence must be one of forward_kl"),
    ({"divergence": "jsd", "beta": 0}, ValueError, "beta must be in [1e-06, 0.999999], got 0"),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta must be in [1e-06, 0.999999], got 1.0"),
    ({"divergence": "jeffreys", "beta": 1e-300}, ValueError, "beta must be in [1e-06, 0.999999]"),
    ({"divergence": "skew_forward_kl", "alpha": 1}, ValueError, "alpha must be in [1e-06, "),
    ({"divergence": "alpha_beta", "alpha": 1e-30}, ValueError, "alpha must be in [0.001, 1000.0]"),
    ({"divergence": "alpha_beta", "beta": 1e30}, ValueError, "beta must be in [0.001, 1000.0]"),
    ({"temperature": 0}, ValueError, "temperature must be in [1e-09, 1000000000.0], got 0"),
    ({"temperature": 1e-320}, ValueError, "temperature must be in [1e-09, 1000000000.0]"),
    ({"temperature": 10**400}, ValueError, "temperature must be a finite number"),
    ({"teacher_temperature": 1e-320}, ValueError, "teacher_temperature must be in [1e-09, "),
    ({"temperature": float("nan")}, ValueError, "temperature must be a finite number, got nan"),
    ({"ce_weight": -1}, ValueError, "ce_weight must be in [0, inf), got -1"),
    ({"ce_weight": 1.0, "targets": None}, ValueError, "targets must be given with ce_weight > 0"),
    ({"targets": torch.arange(5)}, ValueError, "targets must have shape (6,), got (5,)"),
    ({"targets": torch.zeros(N)}, TypeError, "targets must be integers, got torch.float32"),
    (
        {"targets": torch.tensor([0, 1, 2, 20, 4, 5])},
        ValueError,
        "targets must be in [0, 20) or ignore_index=-100, got 20 at row 3",
    ),
    ({"targets": torch.tensor([0, -1, 2, 3, 4, 5])}, ValueError, "got -1 at row 1"),
    ({"targets": torch.zeros(N, dtype=torch.cfloat)}, TypeError, "integers, got torch.complex64"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
    ({"ignore_index": "x", "targets": None}, TypeError, "ignore_index must be an integer, got 'x'"),
    (
        {"token_weight": torch.ones(N, dtype=torch.cfloat)},
        TypeError,
        "token_weight must be real numbers, got torch.complex64",
    ),
    ({"token_weight": 1.0}, TypeError, "token_weight must be a tensor, got float"),
    ({"token_weight": torch.ones(4)}, ValueError, "token_weight must have shape (6,), got (4,)"),
    (
        {"token_weight": torch.tensor([1, 1, -0.5, 1, 1, 1])},
        ValueError,
        "token_weight must be finite and not negative, got -0.5 at row 2",
    ),
    ({"token_weight": torch.full((N,), torch.nan)}, ValueError, "got nan at row 0"),
    (
        {"student_head": LMHead(torch.randn(V, D), torch.full((V,), torch.nan))},
        ValueError,
        "student_head.bias must be finite, or -inf for some tokens, got a maximum of nan",
    ),
    (
        {"teacher_head": LMHead(torch.randn(V, E), torch.full((V,), torch.inf))},
        ValueError,
        "teacher_head.bias must be finite, or -inf for some tokens, got a maximum of inf",
    ),
    (
        {"teacher_head": LMHead(torch.randn(V, E), torch.full((V,), -torch.inf))},
        ValueError,
        "teacher_head.bias must be finite, or -inf for some tokens, got a maximum of -inf",
    ),
    ({"backend": "tritan"}, ValueError, "did you mean 'triton'?"),
    ({"memory_budget": 100}, ValueError, "memory_budget must be at least"),
    ({"memory_budget": 1e9}, TypeError, "memory_budget must be a number of bytes, got 1000000000"),
]


@pytest.mark.parametrize(("change", "error", "message"), DISTILL, ids=lambda v: str(v)[:40])
def test_distill(change, error, message):
    refuses(linear_distill_loss, {**arguments(), **change}, error, message)


def test_one_side_may_be_flat():
    given = arguments()
    want = linear_distill_loss(**given).loss
    for name in ("student_hidden", "teacher_hidden"):
        shaped = {**given, name: given[name].view(2, 3, -1)}
        if name == "student_hidden":
            shaped["targets"] = given["targets"].view(2, 3)
        assert linear_distill_loss(**shaped).loss == want


DUDI = [
    (
        {"segment_ids": torch.tensor([0, 0, 1, 1, 2, 10**12])},
        ValueError,
        "segment_ids must count the sequences from 0, below 1048576, got 1000000000000 at row 5",
    ),
    ({"num_pairs": 2.5}, TypeError, "num_pairs must be an integer, got 2.5"),
    ({"num_pairs": 1}, ValueError, "num_pairs must be at least 2, got 1"),
    ({"off_policy_rows": "a"}, ValueError, "off_policy_rows must be a finite number, got 'a'"),
    ({"pairs": torch.ones(2)}, ValueError, "pairs must be one number, got shape (2,)"),
    ({"preference_length_power": True}, ValueError, "preference_length_power must be 0 or 1"),
    (
        {"reference_log_prob": torch.zeros(4, device="meta")},
        ValueError,
        "reference_log_prob must be on cpu as the rows are, got meta",
    ),
    (
        {"reference_log_prob": torch.tensor([0, -1, torch.nan, 0])},
        ValueError,
        "reference_log_prob must be finite or -inf, got nan of sequence 2",
    ),
    ({"teacher_hidden": TOP}, ValueError, "teacher_head must not be given with a TopKTeacher"),
    *(
        ({"teacher_hidden": TOP, "teacher_head": None, **change}, ValueError, message)
        for change, message in (
            ({"teacher_temperature": 0.5}, "temperature must be 1 with a TopKTeacher"),
            ({"gradient_tolerance": 0.1}, "gradient_tolerance must be 0 with a TopKTeacher, got"),
            ({"teacher_top_p": 0.9}, "teacher_top_p must be 1 with a TopKTeacher, got 0.9"),
            ({"verbalizer": Verbalizer.prefix(V, V)}, "verbalizer must be None with a TopKTeach"),
            (
                {
                    "preference_weight": 1,
                    "reference_log_prob": "teacher",
                    "segment_ids": torch.tensor([0, 0, 1, 1, 2, 3]),
                },
                "reference_log_prob must not be 'teacher' with a TopKTeacher",
            ),
            (
                {"teacher_hidden": TopKTeacher(TOP.ids[1:], TOP.log_probs[1:])},
                "the TopKTeacher must have 6 rows as student_hidden, got 5",
            ),
            (
                {"teacher_hidden": TopKTeacher(TOP.ids + V, TOP.log_probs)},
                "ids must be in [0, 20), those of row 0 are not",
            ),
        )
    ),
    ({"segment_ids": torch.tensor([0, 0, 1, 1, 3, 2])}, ValueError, "must not decrease, got 2"),
    ({"segment_ids": torch.tensor([-1, 0, 1, 1, 2, 3])}, ValueError, "not be negative, got -1"),
    ({"segment_ids": torch.zeros(N)}, TypeError, "segment_ids must be integers"),
    ({"segment_ids": torch.zeros(4).long()}, ValueError, "segment_ids must have shape (6,)"),
    (
        {"segment_ids": torch.tensor([0, 0, 1, 1, 2, 2]), "preference_weight": 0.1},
        ValueError,
        "segment_ids must give both sides of each pair with preference_weight > 0, got no row of "
        "segment 3",
    ),
    ({"targets": torch.full((N,), -100)}, ValueError, "targets must be in [0, 20), got -100"),
    ({"off_policy_weight": -0.1}, ValueError, "off_policy_weight must be in [0, inf), got -0.1"),
    ({"on_policy_weight": "1"}, ValueError, "on_policy_weight must be a finite number, got '1'"),
    ({"preference_beta": 0.0}, ValueError, "preference_beta must be in (0, inf), got 0.0"),
    ({"preference_length_power": 2}, ValueError, "preference_length_power must be 0 or 1, got 2"),
    ({"on_policy_divergence": "jdd"}, ValueError, "on_policy_divergence must be one of"),
    ({"teacher_hidden": None}, ValueError, "teacher_hidden must be given"),
    ({"reference_log_prob": "techer"}, ValueError, "did you mean 'teacher'?"),
    ({"reference_log_prob": 1.0}, TypeError, "reference_log_prob must be a tensor, 'teacher'"),
    ({"reference_log_prob": torch.zeros(3)}, ValueError, "must have shape (4,), got (3,)"),
    ({"off_policy_rows": -1}, ValueError, "off_policy_rows must be in [0, inf), got -1"),
    ({"pairs": 0}, ValueError, "pairs must be positive with 2 of them in this call, got 0"),
    (
        {
            "off_policy_weight": 0,
            "on_policy_weight": 0,
            "preference_weight": 1,
            "reference_log_prob": "teacher",
            "teacher_head": None,
        },
        ValueError,
        "teacher_head must be given where a signal or the reference needs it",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), DUDI, ids=lambda v: str(v)[:40])
def test_dudi(change, error, message):
    given = {**arguments(), "segment_ids": torch.tensor([0, 0, 1, 1, 2, 3]), **change}
    refuses(linear_dudi_loss, given, error, message)


def test_the_rest():
    hidden, head, targets = torch.randn(N, D), torch.randn(V, D), torch.arange(N)
    one = {"hidden": hidden, "head": head, "targets": targets}
    refuses(
        linear_cross_entropy, {**one, "reduction": "avg"}, ValueError, "reduction must be one of"
    )
    refuses(
        linear_log_prob, {**one, "hidden": hidden[:, :3]}, ValueError, "hidden must have width 4"
    )
    refuses(linear_log_prob, {**one, "temperature": -1}, ValueError, "temperature must be in")
    refuses(
        linear_log_prob, {**one, "memory_budget": 10}, ValueError, "memory_budget must be at least"
    )
    refuses(
        sequence_log_prob,
        {**one, "segment_ids": targets, "num_segments": 3},
        ValueError,
        "num_segments must be at least 6, got 3",
    )
    refuses(
        sequence_log_prob,
        {**one, "segment_ids": targets, "num_segments": 6.5},
        TypeError,
        "num_segments must be an integer, got 6.5",
    )
    given = {**arguments(), "teacher_hidden": TOP}
    message = "only linear_distill_loss and linear_dudi_loss take a TopKTeacher"
    refuses(linear_distill, given, TypeError, message)
    for settings, error, message in (
        ({"weight": head.to_sparse()}, TypeError, "weight must be a dense tensor, got"),
        ({"weight": head, "lora": 5}, TypeError, "lora must be a LoRA or None, got int"),
        ({"weight": head, "softcap": "a"}, ValueError, "softcap must be a finite number, got 'a'"),
        ({"weight": head, "scale": "x"}, ValueError, "scale must be a finite number, got 'x'"),
        ({"weight": head, "scale": torch.ones(1)}, ValueError, "scale must be a finite number"),
        ({"weight": head, "scale": -1.0}, ValueError, "scale must be in [1e-15, "),
        ({"weight": head[0]}, ValueError, "weight must have shape (V, D) with V > 0, got (4,)"),
        ({"weight": head, "bias": head[0]}, ValueError, "bias must have shape (20,), got (4,)"),
        ({"weight": head, "bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"weight": head, "softcap": 0.0}, ValueError, "softcap must be in [1e-15, "),
        ({"weight": head, "scale": 0.0}, ValueError, "scale must be in [1e-15, "),
    ):
        refuses(LMHead, settings, error, message)
    factors = {"a": torch.zeros(2, D), "b": torch.zeros(V, 2)}
    refuses(LoRA, {**factors, "scaling": float("nan")}, ValueError, "lora.scaling must be a finite")
    wrong: list[tuple[dict, type[Exception], str]] = [
        ({"ids": [0]}, TypeError, "ids must be a tensor, got list"),
        ({"log_probs": [0.0]}, TypeError, "log_probs must be a tensor, got list"),
        ({"ids": TOP.ids.bool()}, TypeError, "ids must be integers"),
    ]
    for change, kind, text in wrong:
        given = {"ids": TOP.ids, "log_probs": TOP.log_probs, **change}
        refuses(TopKTeacher, given, kind, text)
    for index, rows, kind, text in (
        ([0], 9, TypeError, "index must be a tensor of integers, got [0]"),
        (torch.arange(5), 9, ValueError, "index must name 6 different rows, got (5,)"),
        (torch.zeros(6).long(), 9, ValueError, "got (6,) of which 1 differ"),
        (torch.arange(6) + 4, 9, ValueError, "index must be in [0, 9), got 4 to 9"),
        (torch.arange(6), 5, ValueError, "rows must be at least 6, got 5"),
        (torch.arange(6), 9.0, TypeError, "rows must be an integer, got 9.0"),
    ):
        refuses(TOP.spread, {"index": index, "rows": rows}, kind, text)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": 1.5}, TypeError, "rows must be an integer, got 1.5"),
        ({"rows": -1}, ValueError, "rows must be at least 0, got -1"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"teacher_width": 0}, ValueError, "teacher_width must be at least 1, got 0"),
        ({"teacher_width": 2.5}, TypeError, "teacher_width must be an integer, got 2.5"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 21}, ValueError, "top_k must be at most 20, got 21"),
        ({"top_k": 4, "teacher_width": 8}, ValueError, "top_k must be None with teacher_width"),
        ({"top_k": 4, "per_row": True}, ValueError, "top_k must be None with teacher_width or per"),
        ({"dtype": torch.float64}, TypeError, "dtype must be torch.float32, bfloat16 or float16"),
        ({"dtype": "bf16"}, TypeError, "dtype must be torch.float32, bfloat16 or float16"),
        ({"device": "gpu"}, ValueError, "device must be one that torch knows, got 'gpu'"),
        ({"device": 1.5}, ValueError, "device must be one that torch knows, got 1.5"),
    ],
)
def test_plan_memory(change, error, message):
    refuses(plan_memory, {"rows": N, "vocab_size": V, "width": D, **change}, error, message)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": TEMPERATURES[0]},
        {"temperature": TEMPERATURES[1]},
        *({"divergence": d, "beta": s} for d in ("jsd", "jeffreys") for s in SHARES),
        *(
            {"divergence": f"skew_{d}_kl", "alpha": s}
            for d in ("forward", "reverse")
            for s in SHARES
        ),
        *({"divergence": "alpha_beta", "alpha": a, "beta": b} for a in POWERS for b in POWERS),
    ],
    ids=str,
)
def test_the_ends_of_what_is_accepted_are_finite(settings):
    for bias in (None, torch.tensor([-torch.inf, *[0.0] * (V - 1)])):
        given = arguments()
        for name in ("student", "teacher"):
            given[f"{name}_head"] = LMHead(given[f"{name}_head"], bias)
        given["student_hidden"].requires_grad_()
        got = linear_distill_loss(**given, **settings)
        got.loss.backward()
        assert got.loss.isfinite() and got.divergence.isfinite().all()
        assert given["student_hidden"].grad.isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("softcap", [None, *SCALES])
def test_extreme_heads_are_finite(scale, softcap):
    hidden = torch.randn(N, D, requires_grad=True)
    head = LMHead(torch.randn(V, D), None, softcap, scale)
    values = linear_log_prob(hidden, head, torch.arange(N))
    (grad,) = torch.autograd.grad(values.sum(), hidden)
    assert values.isfinite().all() and grad.isfinite().all()


def test_numbers_of_numpy():
    given = arguments()
    want = linear_distill_loss(**given, temperature=2.0, ce_weight=0.5)
    got = linear_distill_loss(**given, temperature=np.float32(2), ce_weight=np.float64(0.5))
    assert got.loss == want.loss
    assert plan_memory(np.int64(N), V, D) == plan_memory(N, V, D)
