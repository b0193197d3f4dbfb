"""The state of a run in host memory, with the optimizer's state by parameter name.

Names instead of positions make a checkpoint independent of how the parameters were grouped or sharded: what one GPU
wrote, FSDP reads, and the other way round.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from utils.errors import InputError

StateDict = dict[str, Tensor]


@dataclass
class Snapshot:
    model: StateDict
    ema: StateDict | None
    optimizer: dict[str, Any]  # state: by parameter name; param_groups: with the names of their parameters

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by a name for messages."""
        named = {f"model {key}": value for key, value in self.model.items()}
        named |= {f"EMA {key}": value for key, value in (self.ema or {}).items()}
        for name, state in self.optimizer["state"].items():
            named |= {f"optimizer {key} of {name}": v for key, v in state.items() if isinstance(v, Tensor)}
        return named

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def first_nonfinite(self) -> str | None:
        """The name of a tensor with a NaN or an infinity, if there is one."""
        named = self.tensors().items()
        return next((name for name, tensor in named if not torch.isfinite(tensor).all()), None)


def take_snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None, sharded: bool
) -> Snapshot | None:
    """Copy everything to host memory, so that training can go on while it is written.

    Args:
        sharded: the model is under FSDP; then all ranks must call, and only rank 0 gets the snapshot.
    """
    if not sharded:
        ema_state = None if ema is None else _to_host(ema.state_dict())
        return Snapshot(_to_host(model.state_dict()), ema_state, _to_host(_by_name(model, optimizer)))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state = get_model_state_dict(model, options=options)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    return Snapshot(model_state, None, optimizer_state) if torch.distributed.get_rank() == 0 else None


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: object, sharded: bool
) -> None:
    """Load the optimizer state of a snapshot, in place.

    Raises:
        InputError: the names are not those of the model's parameters.
    """
    names = [name for name, _ in model.named_parameters()]
    found = [name for group in saved["param_groups"] for name in group["params"]]
    if sorted(found) != sorted(names):
        differing = sorted(set(found) ^ set(names))
        raise InputError(f"{source}: found another set of parameters; {len(differing)} differ, such as {differing[:1]}")
    if sharded:
        set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
        return
    names_of = _names_by_position(model, optimizer)
    position = {name: i for i, name in enumerate(name for group in names_of for name in group)}
    groups, own = optimizer.state_dict()["param_groups"], []
    for group, group_names in zip(groups, names_of, strict=True):
        saved_group = next(g for g in saved["param_groups"] if group_names[0] in g["params"])
        own.append({**saved_group, "params": group["params"]})
    state = {position[name]: values for name, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": own})


def _by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state, names_of = optimizer.state_dict(), _names_by_position(model, optimizer)
    names = [name for group in names_of for name in group]
    return {
        "state": {names[position]: values for position, values in state["state"].items()},
        "param_groups": [
            {**group, "params": group_names} for group, group_names in zip(state["param_groups"], names_of, strict=True)
        ],
    }


def _names_by_position(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _to_host(value: Any) -> Any:
    """A copy with all tensors on the CPU, on CPU runs too: training goes on in the original."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_to_host(inner) for inner in value]
    return value
