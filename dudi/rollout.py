"""Samples from a model: token ids in, token ids out, nothing decoded on the way.

Prompts are left-padded for `generate`, whose keys and values lie in a cache that grows or has its
full length from the start, or are batched continuously (paged.py). Each completion keeps its eos,
what follows it is cut, and how it ended is told. A seed makes the draw independent of the global
random state, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from dudi.paged import draw_paged
from dudi.sharding import gathered, is_sharded
from dudi.signals import causal_lm

FINISH_REASONS = ("eos", "length", "stop")
STATIC_STEP = 128  # a static cache's length is a multiple: compiled for few of them


class Rollout(NamedTuple):
    completions: list[Tensor]  # B of (R_i,), on the CPU, eos included where it was reached
    finish_reasons: list[str]  # of FINISH_REASONS
    finite: bool = True  # False where a token was drawn from logits with NaN or infinity
    log_prob: Tensor | None = None  # (R,) of all their tokens, where an engine told it


class Finite(LogitsProcessor):
    """Notes logits that can't be drawn from, and makes them drawable, so that nothing asserts on
    the device; the one question, whether there were any, is asked at the end."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~torch.isfinite(scores.amax(-1, keepdim=True))  # the maximum carries NaN
        if self.bad is None:
            self.bad = torch.zeros((), dtype=torch.bool, device=scores.device)
        self.bad |= bad.any()  # in place: a CUDA graph repeats it
        return scores.masked_fill(bad, 0.0)

    @property
    def finite(self) -> bool:
        return self.bad is None or not bool(self.bad)


def left_pad(prompts: Sequence[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(B, P) ids and mask with the prompts flush right."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Run under `seed` and give the global random state back afterwards."""
    if seed is None:
        yield
        return
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """eval() and no_grad, with the training flag given back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def rounded(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, float32 weights have another type; None leaves them.

    Under autocast keys come in one type and values in another, which a cache that is made
    beforehand does not take.
    """
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for weight in model.parameters() if dtype is not None else ():
            if weight.dtype == torch.float32:
                own.append((weight, weight.data))
                weight.data = weight.data.to(dtype)
        yield
    finally:
        for weight, value in own:
            weight.data = value


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's eos, and what the model ends turns with."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *found} - {None})


def cut_at_eos(tokens: Tensor, eos: set[int]) -> tuple[Tensor, str]:
    """Everything up to and including the first eos, and the finish reason."""
    for i, token in enumerate(tokens.tolist()):
        if token in eos:
            return tokens[: i + 1], "eos"
    return tokens, "length"


def cut_at_stop(tokens: Tensor, stops: Sequence[str], tokenizer: Any) -> Tensor | None:
    """Up to the token that completes the first stop string, or None without one."""
    text = tokenizer.decode(tokens)
    if not any(stop in text for stop in stops):
        return None
    low, high = 1, len(tokens)  # the shortest that has one
    while low < high:
        middle = (low + high) // 2
        begun = tokenizer.decode(tokens[:middle])
        if any(stop in begun for stop in stops):
            high = middle
        else:
            low = middle + 1
    return tokens[:low]


def generate(
    model: Any,
    prompts: Sequence[Tensor],  # B of (P_i,)
    *,
    max_completion_length: int,
    eos_token_id: int | list[int],
    pad_token_id: int,
    temperature: float = 1.0,  # 0 is greedy
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop_strings: Sequence[str] | None = None,  # a completion ends with the first of them, too
    tokenizer: Any = None,  # where there are any
    options: Mapping[str, Any] | None = None,  # more of transformers.GenerationConfig
    cache: str = "dynamic",  # or static, paged
    at_once: int | None = None,  # sequences under way together in a paged cache; None: all
    autocast: torch.dtype | None = None,  # of the model's forward
) -> Rollout:
    """Draw one completion for each prompt from `model` (a transformers causal LM or PEFT model)."""
    device = next(model.parameters()).device
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
        **{**sampling, **(options or {})},
    )
    check = Finite()
    own = None if cache == "dynamic" else autocast
    with inference_mode_of(model), seeded(seed, device), gathered(model), rounded(model, own):
        if cache == "paged":
            rows = draw_paged(model, prompts, config, check, seed, at_once)
        else:
            stops = {"stop_strings": list(stop_strings or ()), "tokenizer": tokenizer}
            more = stops if stop_strings else {}
            rows = _draw_padded(model, prompts, config, check, cache == "static", more)
    eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    completions, reasons = [], []
    for row in rows:
        completion, reason = cut_at_eos(row, eos)
        stopped = cut_at_stop(completion, stop_strings, tokenizer) if stop_strings else None
        if stopped is not None:
            completion, reason = stopped, "stop"
        completions.append(completion)
        reasons.append(reason)
    return Rollout(completions, reasons, check.finite)


def _draw_padded(
    model: Any,
    prompts: Sequence[Tensor],
    config: GenerationConfig,
    check: Finite,
    static: bool,
    more: dict[str, Any],
) -> list[Tensor]:
    """New tokens of each prompt, on the CPU, with whatever follows an eos."""
    device = next(model.parameters()).device
    ids, mask = left_pad(prompts, int(config.pad_token_id))
    if static:
        length = ids.shape[1] + int(config.max_new_tokens or 0)
        text_config = causal_lm(model).config.get_text_config(decoder=True)
        rounded = -(-length // STATIC_STEP) * STATIC_STEP
        more = more | {"past_key_values": StaticCache(text_config, max_cache_len=rounded)}
        config.disable_compile = is_sharded(model)  # its weights move with each call
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList([check]),
        synced_gpus=False,  # all weights are here
        **more,
    )
    return list(output[:, ids.shape[1] :].cpu())
