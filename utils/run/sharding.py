"""FSDP2: parameters, gradients and optimizer state cut into a slice per process.

With torch's own `fully_shard`, not with accelerate's plugin: that one is silently ignored on CPU, where it could not be
tested. The numbers are those of a replicated model.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard_model(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Shard in place, each block as a unit of its own; to be followed by building the optimizer.

    Needs the whole model on every device for a moment, and a process group.
    """
    device_type = next(model.parameters()).device.type
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A norm over sharded gradients as a plain tensor; all ranks must call."""
    return value.full_tensor() if isinstance(value, DTensor) else value
