"""Packing: the rows of every response, whatever group its sequence was put in."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from dudi.signals import check_padding_free, pack, response_hidden


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


FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma3_text": Gemma3TextConfig,
    "gpt_neox": GPTNeoXConfig,
}


def body_of(family: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5,
    }  # fmt: skip
    config = FAMILIES[family](**sizes, attn_implementation=attention)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_padding_the_same_hidden_states(family: str, attention: str) -> None:
    """And gradients; sequences of several lengths, in several groups."""
    model = body_of(family, attention)
    check_padding_free(model, "student")
    random = torch.Generator().manual_seed(1)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(2, 64, (n,), generator=random)

    packed = pack([ids(1 + i % 5) for i in range(17)], [ids(1 + i % 7) for i in range(17)], 0)
    assert len(packed.groups) == 2
    found = []
    for free in (False, True):
        hidden = response_hidden(model, packed, free)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([hidden.detach(), *(g.clone() for g in grads)])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(a.norm())


def test_a_body_that_mixes_sequences_is_refused() -> None:
    """One that ignores positions."""
    model: Any = body_of("llama", "sdpa")
    own = model.model.forward
    model.model.forward = lambda position_ids=None, **given: own(**given)
    with pytest.raises(ValueError, match="padding_free must be false: the teacher's body"):
        check_padding_free(model, "teacher")
