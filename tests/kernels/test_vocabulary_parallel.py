"""A vocabulary that ranks share: real processes (gloo) get what one process and the oracle get.

Two ranks take the compiled steps, four ranks those of torch; each computes every case and writes
down what it got (parallel_once.py), two ranks do so twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import parallel_once as once
import pytest
import torch
from cases import KINK_RTOL, RTOL, VALUE_RTOL, error
from parallel_once import Case, Problem, Results
from torch import Tensor

SCRIPT = Path(once.__file__)
CASES = {case.name: case for case in once.cases()}
WORLDS = (2, 4)
SAME = 1e-5  # of the norm, between ranks and one process
ROUNDED = {torch.float32: SAME, torch.bfloat16: 4e-3}  # of gradients in their own dtype


@pytest.fixture(autouse=True)
def _steps() -> None:
    """The processes have steps of their own: in place of those of conftest.py."""


def start(world: int, rank: int, folder: Path) -> subprocess.Popen:
    paths = (SCRIPT.parent, SCRIPT.parents[2])
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DUDI_NATIVE": str(int(world == 2)),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    command = [sys.executable, "-W", "error::FutureWarning", str(SCRIPT), str(folder)]
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def run(world: int, folder: Path) -> list[dict[str, Any]] | str:
    """What each rank of a world got, by name; or what they said instead."""
    started = [start(world, rank, folder) for rank in range(world)]
    try:
        codes = [process.wait(timeout=240) for process in started]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(codes):
        return "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(world))
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The ranks of a world, which is started once, when a test first asks for it."""
    found: dict[int, list[dict[str, Any]] | str] = {}

    def of(world: int) -> list[dict[str, Any]]:
        if world not in found:
            found[world] = run(world, tmp_path_factory.mktemp(f"world{world}"))
        own = found[world]
        assert not isinstance(own, str), own
        return own

    return of


def whole(found: list[Results]) -> Results:
    """Of all ranks: gradients of their rows of the head in a row, the rest the same everywhere."""
    first = dict(found[0])
    for name in first:
        own = [results[name] for results in found]
        if name in ("grad weight", "grad bias", "grad lora_b"):
            first[name] = torch.cat(own)
        else:
            assert all(torch.equal(a.nan_to_num(7), own[0].nan_to_num(7)) for a in own), name
    return first


def assert_near(got: Tensor, want: Tensor, bound: float, name: str) -> None:
    """Infinities and NaN in the same places, and the rest close."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape, name
    assert torch.equal(got.isnan(), want.isnan()), name
    odd = ~want.isfinite()
    assert torch.equal(got[odd].nan_to_num(7), want[odd].nan_to_num(7)), name
    assert error(got.masked_fill(odd, 0), want.masked_fill(odd, 0)) <= bound, name


def bound_of(case: Case, name: str) -> float:
    settings = case.settings
    kink = "total_variation" in (settings.get("divergence"), settings.get("on_policy_divergence"))
    if name.startswith("grad") and kink:
        return KINK_RTOL
    return ROUNDED[case.dtype] if name.startswith("grad") else SAME


PAIRS = [
    (world, name)
    for world in WORLDS
    for name in CASES
    if world == 2 or not name.startswith("triton")
]


@pytest.mark.parametrize(("world", "name"), PAIRS)
def test_ranks_equal_one_process(world, name, ranks):
    case = CASES[name]
    got, want = whole([rank[name] for rank in ranks(world)]), once.compute(case, world)
    assert list(got) == list(want)
    for key, value in want.items():
        assert_near(got[key], value, bound_of(case, key), key)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_in_every_run(name, ranks):
    for rank in ranks(2):
        for key, value in rank[name].items():
            again = rank["again"][name][key]
            assert torch.equal(value.nan_to_num(7), again.nan_to_num(7)), key


# ---- the oracle ----------------------------------------------------------------------------------

INFINITE = ("student-masked-forward_kl", "teacher-masked-reverse_kl")  # no gradient to compare
DENSE = [(w, n) for w, n in PAIRS if not n.endswith((*INFINITE, "empty", "samples"))]


def scores_of(side: Any, lora: Any = None) -> Tensor:
    found = side.hidden @ side.weight.T
    if side.bias is not None:
        found = found + side.bias
    if lora is not None:
        found = found + lora.scaling * (side.hidden @ lora.a.T) @ lora.b.T
    if side.softcap is not None:
        found = side.softcap * torch.tanh(found / side.softcap)
    if side.bias is not None:
        found = found.masked_fill(side.bias == -torch.inf, -torch.inf)
    return found * side.scale


def dense(case: Case, world: int) -> Results:
    """Values and gradients by the textbook, in float64."""
    problem = Problem(case, world)
    lora = problem.lora
    if lora is not None:
        lora = LoRA64(*(t.detach().double().requires_grad_() for t in (lora.a, lora.b)))
    student, teacher = (problem.sides[who].double() for who in ("student", "teacher"))
    counted = problem.targets >= 0
    targets = problem.targets.where(counted, 0)
    scores = scores_of(student, lora)
    with torch.no_grad():
        taught = scores_of(teacher)
    values, loss = textbook(case, problem, scores, taught, targets, counted)
    loss.backward()
    inputs = {"hidden": student.hidden, "weight": student.weight, "bias": student.bias}
    if lora is not None:
        inputs |= {"lora_a": lora.a, "lora_b": lora.b}
    for name, tensor in inputs.items():
        if tensor is not None and name not in case.frozen:
            assert tensor.grad is not None
            values[f"grad {name}"] = tensor.grad
    return {name: value.detach() for name, value in values.items()}


class LoRA64(NamedTuple):
    a: Tensor
    b: Tensor
    scaling: float = 0.3


def textbook(
    case: Case, problem: Problem, scores: Tensor, taught: Tensor, targets: Tensor, counted: Tensor
) -> tuple[Results, Tensor]:
    settings = dict(case.settings)
    temperature: float = settings.get("temperature", 1.0)
    if case.function == "linear_dudi_loss":
        return of_dudi(case, scores, taught, targets)
    if not case.teacher:
        return of_log_prob(case, problem, scores / temperature, targets, counted)
    p = (taught / settings.get("teacher_temperature", temperature)).softmax(-1)
    q = (scores / temperature).softmax(-1)
    measure = oracle.DIVERGENCES[settings.get("divergence", "forward_kl")]
    log_prob = oracle.log_prob(scores, targets) * counted
    values = {
        "divergence": measure(p, q, 0.5, 0.1) * counted,
        "log_prob": log_prob,
        "entropy": entropy_of(scores) * counted,
        "teacher_entropy": entropy_of(taught) * counted,
    }
    if case.function == "linear_distill":
        own = list(values.values())[:3]
        if not case.targets:
            own.pop(1)
        weights = problem.row_gradient[0 : 3 : 1 if case.targets else 2]
        loss = sum(((v * w).sum() for v, w in zip(own, weights, strict=True)), torch.zeros(()))
    else:
        total = values["divergence"] - settings.get("ce_weight", 0.0) * log_prob
        loss = total.sum() / counted.sum()
        values["loss"] = loss
    if not case.targets:
        del values["log_prob"]
    return values, loss


def entropy_of(scores: Tensor) -> Tensor:
    """Of the tokens that a bias does not mask, of which autograd gives no NaN."""
    return oracle.entropy(scores[:, (scores > -torch.inf).all(0)])


def of_log_prob(
    case: Case, problem: Problem, scores: Tensor, targets: Tensor, counted: Tensor
) -> tuple[Results, Tensor]:
    own = oracle.log_prob(scores, targets) * counted
    if case.function == "sequence_log_prob":
        sums = torch.stack([own[i == once.SEGMENTS].sum() for i in range(4)])
        return {"value": sums}, (sums * problem.row_gradient[0, :4]).sum()
    reduction = case.settings.get("reduction", "mean")
    if case.function == "linear_log_prob" or reduction == "none":
        own = own if case.function == "linear_log_prob" else -own
        return {"value": own}, (own * problem.row_gradient[0]).sum()
    loss = -own.sum() / (counted.sum() if reduction == "mean" else 1)
    return {"value": loss}, loss


def of_dudi(case: Case, scores: Tensor, taught: Tensor, targets: Tensor) -> tuple[Results, Tensor]:
    names = ("off_policy", "on_policy", "preference", "ce")
    weights = [case.settings.get(f"{n}_weight", float(n.endswith("policy"))) for n in names]
    found = oracle.dudi(
        scores,
        taught,
        targets,
        once.SEGMENTS,
        weights=tuple(weights),
        divergences=(
            case.settings.get("off_policy_divergence", "forward_kl"),
            "reverse_kl",
        ),
        beta=0.5,
        alpha=0.1,
        temperature=case.settings.get("temperature", 1.0),
        preference_beta=0.1,
        length_power=0,
        reference=case.settings.get("reference_log_prob"),
        denominators=(None, None, None),
    )
    if not weights[1]:  # read as 0 where the signal is off
        del found["on_policy_loss"]
    if not weights[2]:  # the reference is not asked for
        del found["reference_log_probs"]
    return found, found["loss"]


@pytest.mark.parametrize(("world", "name"), DENSE)
def test_ranks_equal_the_oracle(world, name, ranks):
    case = CASES[name]
    got, want = whole([rank[name] for rank in ranks(world)]), dense(case, world)
    for key, value in want.items():
        rounded = RTOL[case.dtype] if key.startswith("grad") else VALUE_RTOL
        assert_near(got[key], value, max(rounded, bound_of(case, key)), key)


# ---- what is refused, and the rest ---------------------------------------------------------------

REFUSED = {
    "width": "width must be the same on every rank of the group, got 8, ",
    "dtype": "dtype must be the same on every rank of the group, got torch.float32, ",
    "bias": "whether there is a bias must be the same on every rank of the group, got 0, ",
    "softcap": r"softcap \(0: none\) must be the same on every rank of the group, got 0.0, ",
    "empty": "every rank must hold rows of the vocabulary, got none on rank",
    "gap": "start must be 5 on rank 1, where the rows of the ranks before end, got 6: a gap",
    "overlap": "start must be 5 on rank 1, .*got 4: an overlap",
    "vocab_size": "vocab_size must be (10|20), the rows of all ranks together, got (11|21)",
    "no group": "group must be given with a plain tensor, got None",
    "group": "group must be a ProcessGroup or a DeviceMesh of one dimension, got str",
    "shard": "weight must have 5 rows as shard has, got 7",
    "rows": "the number of rows must be the same on every rank of the group, got 8, ",
    "gradient": "which inputs require a gradient .* must be the same on every rank",
    "divergence": "divergence, temperature .* must be the same on every rank",
    "beta": "divergence, temperature .* must be the same on every rank",
    "budget": "the plan, made from memory_budget .* must be the same on every rank",
    "call": "every rank of the group must make the same call, got a (scalar loss|loss per row)",
    "nan": "the bias of the student's head must be finite, .*got maxima of .*nan",
    "masked": "the bias of the student's head must be finite, .*got maxima of .-inf",
    "targets": "targets must be in .0, 101. or ignore_index=-100",
    "tolerance": "gradient_tolerance must be 0 with a sharded student_head, got 0.1",
    "top-p": "teacher_top_p must be 1 with a sharded student_head, got 0.9",
    "top-k": "student_head must not be sharded with a TopKTeacher",
    "top-k signals": "student_head must not be sharded with a TopKTeacher",
    "verbalizer": "verbalizer must be None with sharded heads",
    "whole teacher": "teacher_head must be sharded as the other head, .*got a whole head",
    "whole student": "student_head must be sharded as the other head, .*got a whole head",
    "slices": "teacher_head must be sharded as the other head, rows from 0, .*got rows from 0, 5",
    "dtensor": "weight must be a plain tensor, got DTensor: .*LMHead.sharded",
    "columns": r"weight must be sharded by rows, .*got S\(1\)",
    "replicated": "weight must be sharded by rows, .*got R",
    "grid": "weight must be sharded over a mesh of one dimension, got 2",
    "tiny": "every rank must hold rows of the vocabulary, got none on rank 1",
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_raises_the_same(name, world, ranks):
    """No rank is left waiting for one that has raised."""
    found = [rank["refused"] for rank in ranks(world)]
    assert set(found[0]) == set(REFUSED)
    for own in found:
        assert re.search(REFUSED[name], own[name])
        assert name == "call" or own[name] == found[0][name]


def test_no_rank_holds_logits_of_all_rows_or_a_head_of_all_ranks(ranks):
    """The budget holds on each rank, beside its own rows' gradient and what ranks exchange."""
    gradient = once.BIG_VOCAB // 2 * once.BIG_WIDTH * 4  # half of a head
    assert gradient < once.BIG_ROWS * once.BIG_VOCAB // 2 * 4 / 3  # of the logits of a rank
    for rank in ranks(2):
        for name, (peak, largest) in rank["memory"].items():
            assert peak <= 1.1 * once.BIG_BUDGET + gradient + 1_500_000, (name, peak)
            assert largest <= gradient, name


def test_compiled_calls_give_the_same(ranks):
    """One graph, though each call has heads of its own."""
    for rank in ranks(2):
        for name, (apart, graphs) in rank["compiled"].items():
            assert apart <= 1e-6 and graphs == 1, name


def test_the_head_of_a_tensor_parallel_model(ranks):
    found = [rank["model"] for rank in ranks(2)]
    assert [bounds for _, bounds in found] == [(0, 51, 101)] * 2
    assert [len(weight) for weight, _ in found] == [51, 50]
