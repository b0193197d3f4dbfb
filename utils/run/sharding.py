"""One model on several processes: replicated (DDP) or cut into slices (FSDP2).

FSDP with torch's own `fully_shard`, not with accelerate's plugin: that one is silently ignored on CPU, where it could
not be tested. The numbers are those of a replicated model.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import InputError
from utils.ranks import World

SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


def parallelize(model: nn.Module, blocks: Iterable[nn.Module], world: World, fsdp: bool) -> nn.Module:
    """What to call for the forward pass; to be made before the optimizer is.

    Args:
        blocks: units of FSDP: one after another, each has its whole parameters on every device for a moment.
        fsdp: shard parameters, gradients and optimizer state over all processes, in place; else average the gradients.

    Raises:
        InputError: sharding on a CPU by a torch that cannot (2.6).
    """
    if fsdp and world.device.type == "cpu" and not SHARDS_ON_CPU:
        raise InputError(f"training.fsdp=true: torch {torch.__version__} shards on GPUs only, found a CPU")
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh  # here, for both take a while
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.type, (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def accumulating(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: gradients are exchanged in the last one of a step only."""
    return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def clip_gradients(model: nn.Module, max_norm: float, sharded: bool) -> Tensor:
    """Scale the gradients, in place, so that their norm is at most `max_norm`; the norm before. Sharded, all ranks must
    call."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if sharded else norm  # type: ignore[attr-defined]  # a DTensor then
