"""Student and teacher in parts: FSDP2, each rank with its share of weights, gradients and states.

A layer's weights are gathered when its forward begins and let go when it ends. What lies outside of
the layers (norms, the head) is gathered by the forward of the whole model, so whatever reads a head
runs inside that forward: `run_inside`. Weights and optimizer states leave and enter whole, so that
checkpoints are those of one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dudi.signals import causal_lm, redirected_forward

T = TypeVar("T")


# ---- sharding ------------------------------------------------------------------------------------


def make_mesh(fsdp_size: int | str | None, device: torch.device) -> DeviceMesh | None:
    """Ranks in groups of `fsdp_size`, each of which holds a model together; None: do not shard."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if fsdp_size is None or (fsdp_size == "auto" and ranks == 1):
        return None
    size = ranks if fsdp_size == "auto" else int(fsdp_size)
    if ranks % size:
        raise ValueError(
            f"fsdp_size must divide the number of processes, {ranks}, got {fsdp_size}: torchrun "
            "--nproc_per_node starts several"
        )
    if size == ranks:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    shape = (ranks // size, size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Any, mesh: DeviceMesh, who: str, bf16: bool = False) -> None:
    """Leave this rank its part of each weight of `model`, which all ranks have loaded alike.

    `bf16`: weights are gathered in it, gradients reduced in float32. Autocast alone would keep a
    copy of each gathered weight for the backward pass, and find those of a forward without
    gradients again.
    """
    lm = causal_lm(model)
    kinds = set(getattr(lm, "_no_split_modules", None) or ())
    layers = [m for m in lm.modules() if type(m).__name__ in kinds]
    _check(model, layers, mesh, who)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}:
        layers = [embedding, *layers]  # needed by its own forward alone: not kept beside the head
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*reversed(layers), model):  # inner ones first
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def _check(model: Any, layers: list[nn.Module], mesh: DeviceMesh, who: str) -> None:
    name = type(causal_lm(model)).__name__
    if not layers:
        raise ValueError(
            f"fsdp_size: the {who} can't be sharded, {name} does not tell its layers "
            "(`_no_split_modules`)"
        )
    for weight, p in model.named_parameters():
        if type(p.data) is not Tensor or not p.is_floating_point():
            raise ValueError(
                f"fsdp_size: the {who} can't be sharded, its {weight} is quantized or sharded "
                f"already ({type(p.data).__name__}, {p.dtype})"
            )
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(kinds) > 1:
        told = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ValueError(f"fsdp_size: the {who}'s trained weights must have one dtype, got {told}")
    seen = torch.tensor(_digest(model), device=_device(mesh))
    ends = torch.stack([seen, -seen])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if int(ends.sum()):
        raise ValueError(
            f"fsdp_size: the {who} differs between the ranks; load it from one checkpoint, or draw "
            "its weights after transformers.set_seed"
        )


def _digest(model: nn.Module) -> int:
    """Of names, shapes and some values of all weights."""
    digest = hashlib.blake2b(digest_size=7)
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


# ---- where weights are whole ---------------------------------------------------------------------


def run_inside(model: Any, function: Callable[[], T], keep: bool = False) -> T:
    """`function()` inside the forward of `model`, where its head is whole and its layers gather
    themselves; a model that is not sharded needs none.

    `keep`: what lies outside of the layers stays whole, for a backward pass that reads it, until
    `release`.
    """
    if not is_sharded(model):
        return function()
    try:
        with redirected_forward(model, function):
            return model()
    finally:
        if not keep:
            release(model)


def release(model: Any) -> None:
    """Let go of what lies outside of the layers."""
    if is_sharded(model):
        model.reshard()


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, each rank has all weights of `model`: many forwards, and not as many on each rank."""
    if not is_sharded(model):
        yield
        return
    run_inside(model, lambda: None)  # a first forward of all must come before one of its layers
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


# ---- parts and wholes ----------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other as it is."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Any) -> Any:
    """All parts together, on the CPU; every rank must ask."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if isinstance(whole, Tensor) else whole


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as `like` is, without communication."""
    if not isinstance(like, DTensor):
        return whole
    placed = whole.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of an unsharded model on rank 0, nothing on others; every rank must ask."""
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}  # tied weights are one tensor
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            whole = _whole(tensor)
            known[id(tensor)] = whole if dist.get_rank() == 0 else torch.empty(0)
        found[name] = known[id(tensor)]
    return found if dist.get_rank() == 0 else {}


@torch.no_grad()
def load_weights(model: Any, folder: str | Path) -> None:
    """Take the weights, or the adapter, that `save_pretrained` wrote."""
    if hasattr(model, "get_base_model"):
        from peft import get_peft_model_state_dict
        from peft.utils import load_peft_weights

        own, saved = get_peft_model_state_dict(model), load_peft_weights(str(folder), device="cpu")
    else:
        unsharded: Any = type(model).__mro__[2]  # behind FSDP's subclass and FSDPModule
        own = model.state_dict()
        saved = unsharded.from_pretrained(folder, dtype=model.dtype).state_dict()
    if own.keys() != saved.keys():
        name = sorted(own.keys() ^ saved.keys())[0]
        raise ValueError(f"{folder} holds other weights than the model: {name} is in one of them")
    for name, tensor in own.items():
        local(tensor).copy_(local(_part(saved[name], tensor)))


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The state dict of an optimizer of unsharded weights on rank 0; every rank must ask."""
    state = optimizer.state_dict()
    keep = dist.get_rank() == 0
    found: dict[int, dict[str, Any]] = {}
    for i, own in state["state"].items():
        values = {name: _whole(value) for name, value in own.items()}
        found[i] = values if keep else {}
    return {**state, "state": found}


def load_optimizer_state(optimizer: Any, path: str | Path) -> None:
    """Take what `whole_optimizer_state` gave: this rank's parts of it."""
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {
            name: _part(value, weights[i]) if _is_like(value, weights[i]) else value
            for name, value in own.items()
        }
        for i, own in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _is_like(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape
