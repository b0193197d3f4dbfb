"""One model on several processes: replicated (DDP) or cut into slices (FSDP2).

FSDP with torch's own `fully_shard`, not with accelerate's plugin: that one is silently ignored on CPU, where it could
not be tested. The numbers are those of a replicated model, to rounding.
"""

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.precision import in_bf16
from utils.schema import TrainingConfig

SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


def parallelize(
    model: nn.Module, blocks: Iterable[nn.Module], ctx: DistributedContext, training: TrainingConfig
) -> nn.Module:
    """What to call for the forward pass; to be made before the optimizer is.

    Args:
        blocks: units of FSDP: one after another, each has its whole parameters on every device for a moment.
        training: with `fsdp`, parameters, gradients and optimizer state are sharded over all processes, in place; else
            gradients are averaged. In bf16, autocast casts the linear layers of the blocks: sharded, these are sent in
            bf16. Norms, embeddings and gradients are sent in float32.

    Raises:
        InputError: sharding by one process, or on a CPU by a torch that cannot (2.6).
    """
    fsdp = training.fsdp
    if fsdp and ctx.device.type == "cpu" and not SHARDS_ON_CPU:
        raise InputError(f"training.fsdp=true: torch {torch.__version__} shards on GPUs only, found a CPU")
    if fsdp and ctx.size == 1:
        raise InputError("training.fsdp=true: found one process, expected several")
    if fsdp:
        # Their outputs are views, which would be wrong to change in place; nothing does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        from torch.distributed.device_mesh import init_device_mesh  # here, for both take a while
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(ctx.device.type, (ctx.size,))
        policy = MixedPrecisionPolicy()
        if in_bf16(training, ctx.device):
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in blocks:  # the rest is small, and stays whole from forward to backward pass
            linears: list[nn.Module] = [module for module in block.modules() if isinstance(module, nn.Linear)]
            fully_shard(linears, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        return model
    if ctx.size == 1:
        return model
    devices = [ctx.device] if ctx.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)  # gradients lie there once


def accumulating(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: gradients are exchanged in the last one of a step only. Sharded,
    each rank holds whole gradients until then."""
    if hasattr(model, "set_requires_gradient_sync"):  # under FSDP
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def clip_gradients(model: nn.Module, max_norm: float, sharded: bool) -> Tensor:
    """Scale the gradients, in place, so that their norm is at most `max_norm`; the norm before. Sharded, all ranks must
    call."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if sharded else norm  # type: ignore[attr-defined]  # a DTensor then
