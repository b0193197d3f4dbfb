"""The state of a run in host memory, with the optimizer's state by parameter name.

Names instead of positions make a checkpoint independent of how the parameters were grouped or sharded: what one GPU
wrote, FSDP reads, and the other way round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import InputError
from utils.files.weights import check_fits

StateDict = dict[str, Tensor]
Optimizers = dict[str, tuple[nn.Module, torch.optim.Optimizer]]


@dataclass
class Resumable:
    """What a run is resumed into. The names become names of files in a checkpoint.

    Args:
        modules: by name, whose parameters and buffers are the state.
        optimizers: by name, each with the module whose parameters it updates.
        sharded: the modules are under FSDP; then all ranks must take part in saving.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Optimizers = field(default_factory=dict)
    sharded: bool = False


@dataclass
class Snapshot:
    """Copies on the CPU, by the names of `Resumable`."""

    modules: dict[str, StateDict]
    optimizers: dict[str, dict[str, Any]]  # state: by parameter name; param_groups: with the names of their parameters

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by a name for messages."""
        named = {f"{name} {key}": value for name, state in self.modules.items() for key, value in state.items()}
        for optimizer, saved in self.optimizers.items():
            for parameter, state in saved["state"].items():
                tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
                named |= {f"{optimizer} {key} of {parameter}": value for key, value in tensors.items()}
        return named

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def first_nonfinite(self) -> str | None:
        """The name of a tensor with a NaN or an infinity, if there is one."""
        named = self.tensors().items()
        return next((name for name, tensor in named if not torch.isfinite(tensor).all()), None)


class HostBuffers:
    """Host memory for copies of the state, allocated once; pinned where the state is on a GPU, so that a copy waits for
    the GPU once and not for each tensor."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def copy(self, values: dict[str, Any]) -> dict[str, Any]:
        """A copy of nested values with all tensors on the CPU, on CPU runs too: training goes on in the original. The
        next copy replaces it."""
        copied = self._copy(values, "")
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if name not in self._tensors:
                self._tensors[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return self._tensors[name].copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(inner, f"{name}/{key}") for key, inner in value.items()}
        return value


def take_snapshot(resumable: Resumable, buffers: HostBuffers) -> Snapshot:
    """Copy everything to host memory, so that training can go on while it is written. Sharded, all ranks must call, and
    rank 0 alone gets the tensors."""
    modules = {name: weights_of(module, resumable.sharded) for name, module in resumable.modules.items()}
    optimizers = resumable.optimizers.items()
    if resumable.sharded:
        from utils.run.sharded_state import gather_optimizer

        return Snapshot(modules, {name: gather_optimizer(*both) for name, both in optimizers})
    by_name = {name: _by_name(*both) for name, both in optimizers}
    return Snapshot(**buffers.copy({"modules": modules, "optimizers": by_name}))


def weights_of(module: nn.Module, sharded: bool) -> StateDict:
    """The weights; sharded, all ranks must call, and rank 0 alone gets the tensors, in host memory."""
    if sharded:
        from utils.run.sharded_state import gather_weights

        return gather_weights(module)
    return module.state_dict()


def restore_module(module: nn.Module, saved: StateDict, source: object, sharded: bool) -> None:
    """Load the weights of a snapshot, in place; every key and shape must be equal.

    Raises:
        InputError: keys or shapes that differ from the module's.
    """
    check_fits(module, saved, source)
    if sharded:
        from utils.run.sharded_state import scatter_weights

        scatter_weights(module, saved)
    else:
        module.load_state_dict(saved, strict=True)


def restore_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: object, sharded: bool
) -> None:
    """Load the optimizer state of a snapshot, in place. Learning rate, betas and the like stay as they are: they are
    the config's.

    Raises:
        InputError: the names are not those of the module's parameters.
    """
    names = [name for name, _ in module.named_parameters()]
    found = [name for group in saved["param_groups"] for name in group["params"]]
    if sorted(found) != sorted(names):
        differing = sorted(set(found) ^ set(names))
        raise InputError(f"{source}: found another set of parameters; {len(differing)} differ, such as {differing[:1]}")
    if sharded:
        from utils.run.sharded_state import scatter_optimizer

        scatter_optimizer(module, optimizer, saved)
        return
    position = {name: i for i, name in enumerate(name for group in _names(module, optimizer) for name in group)}
    state = {position[name]: values for name, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state, names_of = optimizer.state_dict(), _names(module, optimizer)
    names = [name for group in names_of for name in group]
    return {
        "state": {names[position]: values for position, values in state["state"].items()},
        "param_groups": [
            {**group, "params": group_names} for group, group_names in zip(state["param_groups"], names_of, strict=True)
        ],
    }


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters of each group, in the order of their positions."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
