"""Continuous batching: a sequence that ends gives its place to one that waits (transformers').

Keys and values lie in pages, and every forward pass takes a token of each sequence under way or a
part of a new prompt. What happens depends on prompts, seed and settings alone: all prompts are in
the queue before anything runs, and there are pages for `at_once` sequences of the longest kind,
whatever memory happens to be free. So the same call draws the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor

from dudi.signals import causal_lm

SHORT_PAGE = 32  # tokens; kernels of flash attention want transformers' own 256
FEWEST_TOKENS = 256  # of a forward pass: longer prompts are read in parts
ROOM = 1.25  # below 15 % of free pages no new sequence would begin


def draw_paged(
    model: Any,
    prompts: Sequence[Tensor],  # B of (P_i,)
    config: GenerationConfig,
    check: LogitsProcessor,  # sees all logits first
    seed: int | None = None,
    at_once: int | None = None,  # sequences under way together; None: all
) -> list[Tensor]:
    """New tokens of each prompt, on the CPU, an eos included.

    Raises ValueError for a model that transformers can't batch so, RuntimeError where it fails.
    """
    lm = causal_lm(model)
    longest = max(map(len, prompts)) + int(config.max_new_tokens or 0)
    settings = _settings(lm, longest, min(at_once or len(prompts), len(prompts)), seed)
    try:
        manager = lm.init_continuous_batching(config, settings)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        name = type(lm).__name__
        raise ValueError(f"rollout_cache must not be 'paged' with {name}: {error}") from error
    processors = manager.logit_processor
    processors.logits_processor.insert(0, check)
    processors.do_processing = True
    found = _collected(manager, [prompt.tolist() for prompt in prompts])
    return [torch.tensor(tokens, dtype=torch.long) for tokens in found]


def _settings(lm: Any, longest: int, at_once: int, seed: int | None) -> ContinuousBatchingConfig:
    sizes: dict[str, Any] = {}
    if "flash" not in lm.config._attn_implementation:  # a mask of tokens by tokens is kept
        sizes = {"page_size": SHORT_PAGE, "max_batch_tokens": max(FEWEST_TOKENS, at_once)}
    page = sizes.get("page_size", ContinuousBatchingConfig().page_size)
    return ContinuousBatchingConfig(
        num_blocks=math.ceil(ROOM * at_once * math.ceil(longest / page)),
        max_requests_per_batch=at_once,
        auto_switch_to_flash=False,  # whoever loads a model chooses its attention
        disable_nccl_graph_mixing=False,  # an environment variable: not ours to set
        seed=seed,
        **sizes,
    )


def _collected(manager: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Run until all have ended; whatever goes wrong, the manager's thread ends too."""
    names = manager.add_requests(prompts, max_new_tokens=manager.generation_config.max_new_tokens)
    found: dict[str, list[int]] = {}
    manager.start()
    try:
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching has ended before its sequences did")
            if result is None:
                continue
            if result.error is not None:
                raise RuntimeError(f"continuous batching has failed: {result.error}")
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
    finally:
        manager.stop(hard_stop=len(found) < len(names))
        manager.destroy()
    return [found[name] for name in names]
