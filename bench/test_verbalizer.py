"""What a map between real tokenizers costs: Qwen2.5's vocabulary onto Mistral's (tekken), many to
one, beside the identity of the student's size. The two have other FLOPs, as the teacher's head is
larger: times are for as many.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.measure import Turns
from bench.problems import Shape, make
from bench.report import Results
from bench.vocabularies import qwen, tekken
from dudi_kernels import Verbalizer, linear_distill_loss

TEACHER, STUDENT = 151_936, 131_072  # rows of the heads, padded
D, E = 896, 2048


@lru_cache(maxsize=1)
def _verbalizer() -> Verbalizer:
    return Verbalizer.from_tokenizers(qwen(), tekken(), teacher_size=TEACHER, student_size=STUDENT)


@pytest.mark.parametrize("divergence", ("forward_kl", "jsd"))
def test_verbalizer(
    divergence: str, results: Results, dtype: torch.dtype, device: str, rounds: int
) -> None:
    """Forward and backward, with and without."""
    try:
        verbalizer = _verbalizer().to(device)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    rows = 128
    x = make(Shape("tekken", rows, STUDENT, D, E), dtype, device)
    larger = make(Shape("qwen", rows, TEACHER, 1, E), dtype, device)
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
    flops = (3 * STUDENT * D + TEACHER * E) / (3 * STUDENT * D + STUDENT * E)
    results.tables["Qwen2.5's vocabulary onto tekken's"].append(
        {
            "divergence": divergence,
            "rows": rows,
            "classes": verbalizer.classes.size,
            "time / identity": ratio,
            "for as many FLOPs": ratio / flops,
        }
    )
