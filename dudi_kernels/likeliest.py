"""likeliest_tokens: what a `TopKTeacher` knows, of a head that is there.

Logits are made in fp32 for a few rows at a time, as the losses make them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dudi_kernels import checks
from dudi_kernels.checks import Head
from dudi_kernels.plan import DEFAULT_BUDGET
from dudi_kernels.prepare import as_side, make_plan, pick_backend, with_low
from dudi_kernels.sweep import chunks, even
from dudi_kernels.topk import TopKTeacher


@torch.no_grad()
def likeliest_tokens(
    hidden: Tensor,  # (N, E)
    head: Head,  # (U, E)
    k: int,
    *,
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> TopKTeacher:
    """The k likeliest tokens of each row, and their log-probabilities among all tokens.

    Replaces::

        log_probs, ids = head(hidden).float().log_softmax(-1).topk(k)
        teacher = TopKTeacher(ids, log_probs)

    Args:
        k: at most U. With k = U the bucket is empty, and a loss from this teacher is that from the
            head itself.
        memory_budget: bytes of workspace beyond the result.

    Returns:
        `TopKTeacher` with int64 ids and fp32 log-probabilities (nats, at temperature 1) of shape
        (..., k), the likeliest first.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that don't fit, k out of range.
    """
    rows = with_low(checks.side("", hidden, head))
    side = as_side(rows)
    if side.head.shard is not None:
        raise ValueError("head must not be sharded: its likeliest tokens may be another rank's")
    size, count = side.head.vocab_size, len(side.hidden)
    if checks.integer("k", k, 1) > size:
        raise ValueError(f"k must be at most the head's {size} rows, got {k}")
    engine = pick_backend(backend, side.hidden.device)
    plan = make_plan(side, None, [None], engine, memory_budget)
    step = even(count, plan.chunk_rows)
    device = side.hidden.device
    buffer = torch.empty(min(step, count), size, dtype=torch.float32, device=device)
    ids = torch.empty(count, k, dtype=torch.long, device=device)
    log_probs = torch.empty(count, k, dtype=torch.float32, device=device)
    for start, stop in chunks(0, count, step):
        logits = engine.project(side.rows(start, stop), buffer[: stop - start])
        top = logits.topk(k)
        most = top.values[:, :1]
        rest = logits.sub_(most).exp_().sum(1, keepdim=True, dtype=torch.float64).log()
        ids[start:stop] = top.indices
        log_probs[start:stop] = (top.values - most - rest).float()
    return TopKTeacher(ids.view(*rows.shape, k), log_probs.view(*rows.shape, k))
