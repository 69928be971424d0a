"""Samples are the same wherever keys and values lie: a cache that grows, a static one, pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_trainer import make, make_adapted
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

from dudi.rollout import generate

CACHES = ("dynamic", "static", "paged")
LIMITS: dict[str, Any] = {"max_completion_length": 12, "eos_token_id": 1, "pad_token_id": 0}


def prompts(count: int = 12) -> list[torch.Tensor]:
    """Of unequal lengths; one is longer than a page and a sliding window."""
    random = torch.Generator().manual_seed(0)
    return [torch.randint(2, 300, (3 + 5 * i % 40,), generator=random) for i in range(count)]


def sliding() -> Any:
    """A model whose layers see 8 tokens, but for every second one."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def adapted(folder: Path) -> Any:
    from peft import LoraConfig

    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    return make_adapted(folder, config).model


def naive(model: Any, prompt: torch.Tensor) -> list[int]:
    """The likeliest token, one whole forward pass at a time."""
    ids = prompt.tolist()
    with torch.no_grad():
        while len(ids) < len(prompt) + LIMITS["max_completion_length"] and ids[-1] != 1:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["plain", "sliding", "adapted"])
def test_greedy_samples_are_those_of_whole_forward_passes(
    tmp_path: Path, kind: str, cache: str
) -> None:
    """With padding, pages, windows and an adapter; three at once have to wait for each other."""
    made = {"plain": lambda: tiny.model(0, layers=2), "sliding": sliding}
    model = made[kind]() if kind in made else adapted(tmp_path)
    want = [naive(model.eval(), p) for p in prompts()]
    for at_once in (None, 3):
        got = generate(model.train(), prompts(), temperature=0.0, cache=cache, at_once=at_once,
                       **LIMITS)  # fmt: skip
        assert [c.tolist() for c in got.completions] == want
        ends = [c.tolist()[-1] == 1 for c in got.completions]
        assert [r == "eos" for r in got.finish_reasons] == ends
    assert model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("cache", CACHES)
def test_samples_follow_the_model_and_the_seed(cache: str) -> None:
    """800 first tokens have the frequencies of the model's distribution, cut to its top 5."""
    model = tiny.model(0, vocab=300).eval()
    model.model.embed_tokens.weight.data *= 20
    prompt = torch.arange(5, 12)

    def drawn(seed: int) -> torch.Tensor:
        settings = LIMITS | {"max_completion_length": 2}
        return torch.stack(
            [c[:1] for c in generate(
                model, [prompt] * 800, temperature=1.3, top_k=5, seed=seed, cache=cache, **settings
            ).completions]
        )  # fmt: skip

    before = torch.get_rng_state()
    first, again, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.no_grad():
        top = (model(input_ids=prompt[None]).logits[0, -1] / 1.3).topk(5)
    want = top.values.softmax(0)
    assert set(first.flatten().tolist()) <= set(top.indices.tolist())
    for token, share in zip(top.indices, want, strict=True):
        deviation = (share * (1 - share) / 800).sqrt()
        assert abs((first == token).float().mean() - share) < 4 * deviation + 1e-3


@pytest.mark.parametrize("cache", CACHES)
def test_stop_strings_and_logits_that_are_not_finite(cache: str) -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model(0)
    settings = LIMITS | {"cache": cache, "seed": 3}
    plain = generate(model, prompts(), **settings)
    letter = next(c for c in tokenizer.decode(plain.completions[0][3:6]) if c.isalpha())
    got = generate(model, prompts(), stop_strings=[letter], tokenizer=tokenizer, **settings)
    assert "stop" in got.finish_reasons and plain.finite
    for completion, reason in zip(got.completions, got.finish_reasons, strict=True):
        assert (letter in tokenizer.decode(completion)) == (reason == "stop")
        assert letter not in tokenizer.decode(completion[:-1])
    model.model.norm.weight.data.fill_(float("nan"))
    assert not generate(model, prompts(3), **settings).finite


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_a_resumed_run_draws_the_same(tmp_path: Path, cache: str) -> None:
    """Samples ahead, several of a prompt, bf16; bit for bit those of a run never stopped."""
    settings: dict[str, Any] = {
        "rollout_cache": cache, "rollout_steps": 2, "num_generations": 2, "bf16": True,
        "rollout_batch_size": 5, "save_strategy": "steps", "save_steps": 1, "max_steps": 4,
    }  # fmt: skip
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    again = make(tmp_path / "again", **settings)
    again.train(str(tmp_path / "whole" / "checkpoint-1"))
    assert tiny.logged(tmp_path / "again") == tiny.logged(tmp_path / "whole")[1:]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_activations_may_be_made_twice(tmp_path: Path, cache: str) -> None:
    for twice in (False, True):
        settings = {"activation_checkpointing": twice, "rollout_cache": cache, "max_steps": 2}
        make(tmp_path / str(twice), **settings).train()
    assert tiny.logged(tmp_path / "False") == tiny.logged(tmp_path / "True")


def test_what_a_paged_cache_gives_processors() -> None:
    """Each option that it takes is made of logits alone; the tokens before are not there."""
    from dudi.config import PAGED_OPTIONS

    values = {"suppress_tokens": [7], "renormalize_logits": True}
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    for name in PAGED_OPTIONS:
        config = GenerationConfig(do_sample=True, **{name: values.get(name, 0.3)})
        processors = tiny.model(0)._get_logits_processor(config)
        assert processors, name
        one, other = (processors(torch.randint(2, 300, (4, n)), logits.clone()) for n in (1, 9))
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_cache": "hybrid"}, "rollout_cache must be one of dynamic, static, paged"),
        (
            {"rollout_cache": "paged", "generation_kwargs": {"repetition_penalty": 1.1}},
            "must not have repetition_penalty with rollout_cache='paged'",
        ),
        (
            {"rollout_cache": "static", "generation_kwargs": {"cache_implementation": "static"}},
            "must not have cache_implementation with rollout_cache='static'",
        ),
    ],
)
def test_refusals(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)


def test_a_model_that_has_no_pages_is_named() -> None:
    model = tiny.model(0)
    model.config.layer_types = ["linear_attention"]
    with pytest.raises((ValueError, RuntimeError), match=r"paged|continuous batching has failed"):
        generate(model, prompts(2), cache="paged", **LIMITS)
