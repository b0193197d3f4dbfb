"""Whole tensors from and into a model under FSDP; all ranks must call.

To be imported where a run is sharded, for what is imported here takes a second.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0 alone, in host memory
WHOLE = StateDictOptions(full_state_dict=True)


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], get_model_state_dict(module, options=GATHER))


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """On each rank, on its device."""
    return cast(dict[str, Tensor], get_model_state_dict(module, options=WHOLE))


def gather_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """By parameter name."""
    return get_optimizer_state_dict(module, optimizer, options=GATHER)


def scatter_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    set_model_state_dict(module, dict(weights), options=WHOLE)


def scatter_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The settings of the groups stay as they are."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(module, optimizer, state, options=WHOLE)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
