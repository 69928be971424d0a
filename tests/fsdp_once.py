"""For test_distributed.py, in torchrun: a fused loss inside the forward of an FSDP2 model."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dudi.run import leave_ranks
from dudi.signals import lm_head, pack, redirected_forward, response_hidden
from dudi_kernels import linear_distill_loss


def loss_of(module: Any, packed: Any, teacher: Any) -> Any:
    """The loss, computed where the wrapper's hooks have gathered the weights."""

    def forward() -> Any:
        return linear_distill_loss(
            response_hidden(module, packed),
            lm_head(module),
            response_hidden(teacher, packed).detach(),
            lm_head(teacher),
        ).loss

    with redirected_forward(module, forward):
        return module()


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    prompts = [torch.randint(2, 500, (5 + i,)) for i in range(4)]
    responses = [torch.randint(2, 500, (3 + i,)) for i in range(4)]
    packed = pack(prompts, responses, pad_token_id=0)
    teacher = tiny.model(1).requires_grad_(False)
    whole, sharded = tiny.model(0), tiny.model(0)
    loss_of(whole, packed, teacher).backward()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss_of(sharded, packed, teacher).backward()
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        full = b.grad.full_tensor()
        assert b.grad.to_local().numel() < a.numel(), name
        assert torch.allclose(full, a.grad, atol=1e-7, rtol=1e-5), name
    leave_ranks()


if __name__ == "__main__":
    main()
