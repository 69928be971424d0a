"""The student as one plain checkpoint, for an engine that samples from it: what adapters add is
merged into what is written, never into the model.

A layer with an adapter is copied, the copy merged by peft, one layer at a time: weights that train
stay as they are, to the bit. Of a model in parts (FSDP) all ranks take part and rank 0 writes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dudi.sharding import gathered
from dudi.signals import causal_lm


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def write_merged(model: Any, folder: Path) -> None:
    """Write the weights, as `save_pretrained` names and shards them; every rank must ask."""
    with gathered(model):
        if is_first_rank():
            lm = causal_lm(model)
            lm.save_pretrained(folder, state_dict=merged_state(lm))


def merged_state(lm: nn.Module) -> dict[str, Tensor]:
    """The state dict of a causal LM as it would be without adapters, their change in its weights.

    Raises ValueError for what can't be written so: quantized weights, an adapter on one end of
    tied embeddings, kinds of adapters that can't be merged.
    """
    adapted = _adapted(lm)
    _check_ties(lm, adapted)
    found = {
        name: tensor
        for name, tensor in _tensors(lm).items()
        if not any(name.startswith(f"{own}.") for own in adapted)
    }
    for own, layer in adapted.items():
        # on the CPU: of the copies one at a time is on the device
        found |= {f"{own}.{name}": t.cpu() for name, t in _tensors(_merged(layer)).items()}
    for name, tensor in found.items():
        if not tensor.is_floating_point() and name.endswith("weight"):
            raise ValueError(
                f"rollout_backend must be transformers with quantized weights, {name} has dtype "
                f"{tensor.dtype}"
            )
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and persistent buffers as they lie; FSDP's state dict would let gathered ones go."""
    found = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}".lstrip(".")] = buffer
    return found


def _adapted(lm: nn.Module) -> dict[str, Any]:
    """The outermost layers that peft has wrapped, by name."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        return {}
    found: dict[str, Any] = {}
    for name, module in lm.named_modules():
        inside = any(name.startswith(f"{own}.") for own in found)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            found[name] = module
    return found


def _merged(layer: Any) -> nn.Module:
    """A copy of what the layer wraps, with its adapters merged in."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        return layer.modules_to_save[layer.active_adapters[0]]
    if not isinstance(layer, BaseTunerLayer):
        raise ValueError(
            "rollout_backend must be transformers with an adapter of kind "
            f"{type(layer).__name__}, which can't be merged into a copy"
        )
    own: Any = copy.deepcopy(layer)
    own.merge()
    base = own.get_base_layer()
    if any(isinstance(m, BaseTunerLayer) for m in base.modules()):
        raise ValueError(
            f"rollout_backend must be transformers with adapters inside adapters, got one in a "
            f"{type(layer).__name__}"
        )
    return base


def _check_ties(lm: Any, adapted: dict[str, Any]) -> None:
    """One weight can't be written as two."""
    if not getattr(lm.config, "tie_word_embeddings", False):
        return
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    inner = {id(m) for end in ends if end is not None for m in end.modules()}
    for name, layer in adapted.items():
        if inner & {id(m) for m in layer.modules()}:
            raise ValueError(
                f"rollout_backend must be transformers with an adapter on {name}, an end of tied "
                "embeddings: an engine has one weight for both"
            )
