"""From token ids to the three-signal loss: packing, hidden states, heads, one fused sweep.

Sequences are packed as [prompt, response, padding], those of like length together. Only the rows
whose hidden state predicts a response token reach the kernels, sequence by sequence, so that rows
of student and teacher pair by response position whatever their prompts were. Bodies give hidden
states only; no logits exist here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dudi.known import KnownStates, KnownTeacher
from dudi.packed import Group, Packed
from dudi_kernels import LMHead

COMPILED = "_dudi_compiled"  # attribute of a body
PADDING_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of rounding
MOST_GROUPS, SMALLEST_GROUP = 4, 8  # a few passes with little padding; none too small to be fast


def number_of_groups(sequences: int) -> int:
    """Forward passes that so many sequences are packed for."""
    return max(1, min(MOST_GROUPS, sequences // SMALLEST_GROUP))


def pack(
    prompts: Sequence[Tensor],  # B of (P_i,)
    responses: Sequence[Tensor],  # B of (R_i,)
    pad_token_id: int,
    segments: Sequence[int] | None = None,  # B segment numbers; default 0, 1, ..., B - 1
) -> Packed:
    """Put each response right after its prompt, padding last, so no row comes from a PAD token."""
    sequences = [torch.cat([p, r]) for p, r in zip(prompts, responses, strict=True)]
    count = number_of_groups(len(sequences))
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    parts = [part.tolist() for part in torch.tensor(by_length).tensor_split(count)]
    groups = tuple(
        _group([sequences[i] for i in part], [len(prompts[i]) for i in part], pad_token_id)
        for part in parts
    )
    lengths = torch.tensor([len(r) for r in responses])
    numbers = torch.arange(len(sequences)) if segments is None else torch.tensor(segments)
    of_row = torch.tensor(by_length).repeat_interleave(lengths[by_length])
    return Packed(
        groups,
        of_row.argsort(stable=True),
        torch.cat([r.long() for r in responses]),
        numbers.repeat_interleave(lengths),
    )


def _group(sequences: list[Tensor], prompt_lengths: list[int], pad_token_id: int) -> Group:
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    row_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, (sequence, prompt) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        input_ids[i, : len(sequence)] = sequence
        attention_mask[i, : len(sequence)] = 1
        row_mask[i, prompt - 1 : len(sequence) - 1] = True
    return Group(input_ids, attention_mask, row_mask)


def causal_lm(model: Any) -> Any:
    """The transformers causal LM inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def response_hidden(model: nn.Module, packed: Packed, padding_free: bool = False) -> Tensor:
    """Final hidden states (N, D) of the rows that predict response tokens.

    `padding_free`: the sequences of a group go one after another as a single one, without padding;
    positions that begin anew tell the body where each begins.
    """
    if isinstance(model, KnownStates):
        return model.hidden(packed, padding_free)
    lm = causal_lm(model)
    body = lm.base_model
    if body is lm:
        raise ValueError(f"model must have a body apart from its head, got {type(lm).__name__}")
    rows = []
    body = body.__dict__.get(COMPILED, body)
    for ids, attention_mask, row_mask in packed.groups:
        if padding_free:
            there = attention_mask.bool()
            positions = (attention_mask.cumsum(1) - 1)[there]
            output = body(input_ids=ids[there][None], position_ids=positions[None], use_cache=False)
            rows.append(output.last_hidden_state[0, row_mask[there]])
        else:
            output = body(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            rows.append(output.last_hidden_state[row_mask])
    return torch.cat(rows)[packed.order]


def compile_body(model: nn.Module) -> None:
    """Let `response_hidden` run a compiled body; `generate`, with its growing cache, does not."""
    body = causal_lm(model).base_model
    body.__dict__[COMPILED] = torch.compile(body, dynamic=True)  # no submodule: no second weights


@torch.no_grad()
def check_padding_free(model: Any, who: str) -> None:
    """Raise ValueError where tokens see more than their own sequence: bodies differ in what they
    make of positions that begin anew."""
    device = next(model.parameters()).device
    ids = torch.arange(2, 12)
    packed = pack([ids[:3], ids[:4]], [ids[3:8], ids[4:]], 0).to(device)
    training = model.training
    model.eval()
    try:
        apart, together = (response_hidden(model, packed, free) for free in (False, True))
    finally:
        model.train(training)
    error = (together - apart).float().norm() / apart.float().norm()
    if not float(error) < PADDING_ERROR[apart.dtype]:
        raise ValueError(
            f"padding_free must be false: the {who}'s body ({type(model).__name__}, attention "
            f"{model.config._attn_implementation}) mixes sequences that are packed without padding"
        )


def lm_head(model: nn.Module) -> LMHead:
    """The model's head as the kernels take it: the live parameters, not copies."""
    return model.head if isinstance(model, KnownStates) else LMHead.from_model(model)


def vocab_size(model: nn.Module) -> int:
    """Rows of a model's head, also of one that is not here."""
    return (model.vocab_size or 0) if isinstance(model, KnownTeacher) else lm_head(model).vocab_size


@contextmanager
def redirected_forward(module: nn.Module, function: Any) -> Iterator[None]:
    """Let `module.forward` be `function` for one call through its wrapper.

    DDP and FSDP synchronise in the hooks around `wrapped(...)`; calling the inner module would
    bypass them, so the loss is computed inside the wrapped call.
    """
    own = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()  # the body must find the real forward again
        return function(*args, **kwargs)

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        restore()
