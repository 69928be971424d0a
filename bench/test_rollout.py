"""Samples from the three caches of `rollout_cache`, in tokens a second of the CPU (all threads; on
a GPU of its own) beside `dynamic`: a model of 10M parameters, samples of one length and samples
that end when chance says.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cases import device_of, selection
from bench.measure import Turns, summary
from bench.report import Results
from dudi.rollout import generate

CACHES = ("dynamic", "static", "paged")
ENDS = 1.5  # the mean length, were none cut, is `longest` over this


class Size(NamedTuple):
    width: int
    layers: int
    vocab_size: int
    prompts: int
    at_once: int
    longest: int  # tokens of a sample


SIZE, ALL = Size(256, 6, 16_384, 12, 4, 32), Size(256, 6, 16_384, 48, 16, 128)
QUICK = Size(32, 1, 300, 4, 2, 6)


def model_of(size: Size, device: str) -> Any:
    """As it is initialised: all tokens are about equally likely."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.width, intermediate_size=4 * size.width,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to(device).eval()


class Drawing:
    """Draws what a run draws for a step: in a paged cache all at once, else some at a time."""

    def __init__(self, model: Any, size: Size, by_chance: bool):
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, 24, (size.prompts,), generator=random).sort().values.tolist()
        self.prompts = [torch.randint(2, size.vocab_size, (n,), generator=random) for n in lengths]
        # so many tokens end a sample that one of them comes in a step with this probability
        last = round(ENDS / size.longest * size.vocab_size)
        self.eos = list(range(1, 1 + last)) if by_chance else size.vocab_size  # the last is none
        self.model, self.size = model, size
        self.tokens: dict[str, list[int]] = {name: [] for name in CACHES}

    def draw(self, cache: str) -> None:
        step = len(self.prompts) if cache == "paged" else self.size.at_once
        found: list[Tensor] = []
        for start in range(0, len(self.prompts), step):
            found += generate(
                self.model,
                self.prompts[start : start + step],
                max_completion_length=self.size.longest,
                eos_token_id=self.eos,
                pad_token_id=0,
                seed=len(self.tokens[cache]),
                cache=cache,
                at_once=self.size.at_once,
            ).completions
        self.tokens[cache].append(sum(map(len, found)))


@pytest.mark.parametrize("by_chance", (False, True), ids=("one_length", "chance"))
def test_rollout(
    by_chance: bool, results: Results, rounds: int, pytestconfig: pytest.Config
) -> None:
    chosen, device = selection(pytestconfig), device_of(pytestconfig)
    size = QUICK if chosen["quick"] else ALL if chosen["everything"] else SIZE
    drawing = Drawing(model_of(size, device), size, by_chance)
    turns = Turns(
        {name: partial(drawing.draw, name) for name in CACHES}, device == "cuda", time.process_time
    )
    assert not (failed := turns.warm_up()), failed
    for _ in range(rounds):
        turns.take(*turns.steps)
    line: dict[str, Any] = {"samples": size.prompts, "at once": size.at_once}
    drawn = {name: own[1:] for name, own in drawing.tokens.items()}  # the first was to warm up
    line["mean length"] = sum(map(sum, drawn.values())) / (len(CACHES) * rounds * size.prompts)
    # seconds a token, so that what chance draws longer is no slower
    each = {
        name: [s / n for s, n in zip(turns.seconds[name], drawn[name], strict=True)]
        for name in CACHES
    }
    line["dynamic, tokens/s"] = 1 / summary(each["dynamic"], each["dynamic"]).seconds
    for name in CACHES[1:]:
        line[f"{name} / dynamic"] = summary(each["dynamic"], each[name]).ratio
    results.tables["samples, tokens a second"].append(line)
