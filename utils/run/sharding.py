"""One model on several processes: replicated (DDP) or sharded (FSDP2).

torch's own `fully_shard`, not accelerate's plugin, which a CPU ignores silently, so that it cannot be tested there. The
numbers equal a replicated model's, up to rounding.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.precision import in_bf16
from utils.schema import TrainingConfig

M = TypeVar("M", bound=nn.Module)
SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


def parallelize(
    model: nn.Module, blocks: Iterable[nn.Module], ctx: DistributedContext, training: TrainingConfig
) -> nn.Module:
    """The module to call in the forward pass. Call this before the optimizer is built.

    Args:
        blocks: units of FSDP; parameters are gathered one block at a time.
        training: with `fsdp`, parameters, gradients and optimizer state are sharded over all processes, in place; else
            DDP. In bf16, the blocks' linear layers, which autocast casts anyway, are gathered in bf16; norms,
            embeddings and gradients in float32.

    Raises InputError for FSDP on one process, or on a CPU with a torch that cannot shard there (2.6).
    """
    if training.fsdp and ctx.device.type == "cpu" and not SHARDS_ON_CPU:
        raise InputError(f"training.fsdp=true: torch {torch.__version__} shards on GPUs only, found a CPU")
    if training.fsdp and ctx.size == 1:
        raise InputError("training.fsdp=true: found one process, expected several")
    if training.fsdp:
        _shard(model, blocks, ctx, training)
        return model
    if ctx.size == 1:
        return model
    devices = [ctx.device] if ctx.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _shard(model: nn.Module, blocks: Iterable[nn.Module], ctx: DistributedContext, training: TrainingConfig) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # slow imports
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # The outputs are views, which must not be changed in place, and are not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ctx.device.type, (ctx.size,))
    policy = MixedPrecisionPolicy()
    if in_bf16(training, ctx.device):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        linears: list[nn.Module] = [module for module in block.modules() if isinstance(module, nn.Linear)]
        fully_shard(linears, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # the rest is small and stays gathered until the backward pass


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")  # a method of FSDPModule, whose import takes a second


def accumulating(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around forward and backward pass of a micro-batch: gradients are exchanged in the last one of a step only; until
    then each rank of FSDP holds whole gradients."""
    if is_sharded(model):
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients in place to a norm of at most `max_norm`. Returns the previous norm. All ranks call it."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if is_sharded(model) else norm  # type: ignore[attr-defined]  # sharded, a DTensor


def unsharded(model: M, build: Callable[[], M]) -> M:
    """The model or, if it is sharded, a copy from `build` with all weights on each rank, for sampling, which reads
    weights outside the forward pass. All ranks call it."""
    if not is_sharded(model):
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.device("meta"):
        copy = build()
    copy.load_state_dict(weights, assign=True)
    return copy
