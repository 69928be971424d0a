"""What a map between real tokenizers costs: Qwen2.5's vocabulary onto Mistral's (tekken), many to
one, beside the identity of the student's size. The two have other FLOPs, as the teacher's head is
larger: times are for as many.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.cases import selection
from bench.measure import Turns
from bench.problems import Shape, make
from bench.report import Results
from bench.vocabularies import qwen, tekken
from dudi_kernels import Verbalizer, linear_distill_loss

TEACHER, STUDENT = 151_936, 131_072  # rows of the heads, padded
D, E = 896, 2048
SMALL = 4000, 3000  # to see that everything runs


@lru_cache(maxsize=2)
def _verbalizer(quick: bool) -> Verbalizer:
    if quick:
        ids = torch.arange(SMALL[0])
        return Verbalizer.from_coo(
            ids, ids % 1999, torch.ones(len(ids)), teacher_size=SMALL[0], student_size=SMALL[1]
        )
    return Verbalizer.from_tokenizers(qwen(), tekken(), teacher_size=TEACHER, student_size=STUDENT)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all")
    metafunc.parametrize("divergence", ("forward_kl", "jsd") if everything else ("forward_kl",))


def test_verbalizer(
    divergence: str,
    results: Results,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    pytestconfig: pytest.Config,
) -> None:
    """Forward and backward, with and without."""
    try:
        verbalizer = _verbalizer(selection(pytestconfig)["quick"]).to(device)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    rows, v, u = 128, verbalizer.student_size, verbalizer.teacher_size
    x = make(Shape("tekken", rows, v, D, E), dtype, device)
    larger = make(Shape("qwen", rows, u, 1, E), dtype, device)
    teachers: dict[str, tuple[Tensor, Tensor, Verbalizer | None]] = {
        "identity": (x.teacher_hidden, x.teacher_weight, None),
        "many to one": (larger.teacher_hidden, larger.teacher_weight, verbalizer),
    }

    def step(name: str) -> None:
        x.clear()
        hidden, weight, own = teachers[name]
        linear_distill_loss(
            x.hidden, x.weight, hidden, weight, divergence=divergence, verbalizer=own
        ).loss.backward()

    turns = Turns({name: lambda name=name: step(name) for name in teachers}, device == "cuda")  # type: ignore[misc]
    assert not turns.warm_up()
    for _ in range(rounds):
        turns.take(*turns.steps)
    pairs = zip(turns.seconds["many to one"], turns.seconds["identity"], strict=True)
    ratios = sorted(own / other for own, other in pairs)
    ratio = ratios[len(ratios) // 2]
    flops = (3 * v * D + u * E) / (3 * v * D + v * E)
    results.tables["Qwen2.5's vocabulary onto tekken's"].append(
        {
            "divergence": divergence,
            "rows": rows,
            "classes": verbalizer.classes.size,
            "time / identity": ratio,
            "for as many FLOPs": ratio / flops,
        }
    )
