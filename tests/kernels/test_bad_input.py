"""Each wrong argument gets an error that names it, what was wanted and what was given."""

from __future__ import annotations

import re

import pytest
import torch

from dudi_kernels import (
    LMHead,
    TopKTeacher,
    linear_cross_entropy,
    linear_distill_loss,
    linear_dudi_loss,
    linear_log_prob,
    sequence_log_prob,
)

N, V, D, E = 6, 20, 4, 5


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
    ({"divergence": "jsd", "beta": 0}, ValueError, "beta must be in (0, 1), got 0"),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta must be in (0, 1), got 1.0"),
    ({"divergence": "skew_forward_kl", "alpha": 1}, ValueError, "alpha must be in (0, 1), got 1"),
    ({"temperature": 0}, ValueError, "temperature must be in (0, inf), got 0"),
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
    ({"token_weight": 1.0}, TypeError, "token_weight must be a tensor, got float"),
    ({"token_weight": torch.ones(4)}, ValueError, "token_weight must have shape (6,), got (4,)"),
    (
        {"token_weight": torch.tensor([1, 1, -0.5, 1, 1, 1])},
        ValueError,
        "token_weight must be finite and not negative, got -0.5 at row 2",
    ),
    ({"token_weight": torch.full((N,), torch.nan)}, ValueError, "got nan at row 0"),
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
    ({"off_policy_rows": -1}, ValueError, "off_policy_rows must be finite and not negative"),
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
    for settings, error, message in (
        ({"weight": head[0]}, ValueError, "weight must have shape (V, D) with V > 0, got (4,)"),
        ({"weight": head, "bias": head[0]}, ValueError, "bias must have shape (20,), got (4,)"),
        ({"weight": head, "bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"weight": head, "softcap": 0.0}, ValueError, "softcap must be positive or None, got 0"),
        ({"weight": head, "scale": 0.0}, ValueError, "scale must be finite and not 0, got 0.0"),
    ):
        refuses(LMHead, settings, error, message)
