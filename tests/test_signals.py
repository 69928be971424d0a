"""Packing: the rows of every response, whatever group its sequence was put in."""

from __future__ import annotations

import pytest
import tiny
import torch

from dudi.signals import pack, response_hidden


@pytest.mark.parametrize("count", [1, 3, 16, 37, 70])
def test_rows_are_those_of_each_sequence_alone(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    draw = lambda high: torch.randint(1, high, (1,), generator=generator).item()  # noqa: E731
    prompts, responses = (
        [torch.randint(2, 500, (int(draw(most)),), generator=generator) for _ in range(count)]
        for most in (40, 9)
    )
    model = tiny.model()
    packed = pack(prompts, responses, pad_token_id=0)
    assert len(packed.groups) == max(1, min(4, count // 8))
    hidden = response_hidden(model, packed)
    start = 0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = model.model(torch.cat([prompt, response])[None]).last_hidden_state[0]
        rows = slice(start, start + len(response))
        assert torch.allclose(hidden[rows], alone[len(prompt) - 1 : -1], atol=1e-5)
        assert torch.equal(packed.targets[rows], response)
        assert (packed.segment_ids[rows] == i).all()
        start += len(response)
    assert start == len(hidden)
    assert packed.num_tokens == sum(map(len, prompts)) + sum(map(len, responses))
