"""Optimizers, parameter groups, learning rate and moving average of the weights.

A new optimizer is a function like `adamw`, a line in `OPTIMIZERS`, and its name among the choices of `optimizer.name`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.config import Config
from utils.errors import InputError
from utils.schedules import SCHEDULES, ema_decay
from utils.schema import OptimizerConfig, OptimizerParams, ParamGroupConfig

M = TypeVar("M", bound=nn.Module)
Optimizers = dict[str, torch.optim.Optimizer]  # by name of the file in a checkpoint; together they update one model


@dataclass(frozen=True, eq=False)
class TrainedParameter:
    name: str  # in the model's state dict
    parameter: nn.Parameter
    lr_factor: float  # its learning rate as a multiple of the schedule's
    weight_decay: float


def param_groups(parameters: Iterable[TrainedParameter]) -> list[dict[str, Any]]:
    """torch's parameter groups: the parameters with equal settings in one group."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for one in parameters:
        groups.setdefault((one.lr_factor, one.weight_decay), []).append(one.parameter)
    return [
        {"params": members, "lr_factor": lr_factor, "weight_decay": weight_decay}
        for (lr_factor, weight_decay), members in groups.items()
    ]


def adamw(parameters: list[TrainedParameter], params: OptimizerParams) -> Optimizers:
    optimizer = torch.optim.AdamW(
        param_groups(parameters),
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        fused=parameters[0].parameter.is_cuda,
    )
    return {"optimizer": optimizer}


def muon(parameters: list[TrainedParameter], params: OptimizerParams) -> Optimizers:
    """Muon (https://kellerjordan.github.io/posts/muon) for the matrices of the blocks, AdamW for everything else.

    `match_rms_adamw` gives the updates AdamW's size, so that learning rate and weight decay can be AdamW's
    (https://arxiv.org/abs/2502.16982).

    Raises:
        InputError: a torch without Muon, sharded matrices, or a model without blocks.
    """
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"optimizer.name=muon: found torch {torch.__version__}, expected 2.9 or later; use adamw")
    matrices = [one for one in parameters if one.name.startswith("blocks.") and one.parameter.ndim == 2]
    if not matrices:
        raise InputError("optimizer.name=muon: found no matrices in `blocks`, expected a transformer; use adamw")
    if hasattr(matrices[0].parameter, "full_tensor"):  # a DTensor, on which torch's Muon rounds differently or fails
        raise InputError("optimizer.name=muon: found training.fsdp=true, expected false; use adamw to shard")
    others = [one for one in parameters if one not in matrices]
    optimizer = torch.optim.Muon(
        param_groups(matrices),
        lr=params.learning_rate,
        momentum=params.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return {"muon": optimizer, **adamw(others, params)}


OPTIMIZERS: dict[str, Callable[[list[TrainedParameter], OptimizerParams], Optimizers]] = {"adamw": adamw, "muon": muon}


def build_optimizers(model: nn.Module, config: Config) -> Optimizers:
    """The optimizers of `optimizer.name`, which together update all parameters of the model.

    Raises:
        InputError: a pattern of `optimizer.param_groups` without a parameter, or an optimizer that does not fit.
    """
    return OPTIMIZERS[config.optimizer.name](trained_parameters(model, config.optimizer), config.optimizer.params)


def trained_parameters(model: nn.Module, config: OptimizerConfig) -> list[TrainedParameter]:
    """All parameters with their settings, from the first of `config.param_groups` whose pattern is found in the name.
    By default matrices are decayed, except the model's `no_weight_decay()`.

    Raises:
        InputError: a pattern without a parameter.
    """
    not_decayed = model.no_weight_decay()  # type: ignore[operator]  # timm's convention, not of nn.Module
    groups = [*config.param_groups, ParamGroupConfig(pattern="")]  # found in every name
    matches = Counter[int]()
    parameters = []
    for name, parameter in model.named_parameters():
        index = next(index for index, group in enumerate(groups) if re.search(group.pattern, name))
        matches[index] += 1
        weight_decay = groups[index].weight_decay
        if weight_decay is None:
            weight_decay = 0.0 if parameter.ndim <= 1 or name in not_decayed else config.params.weight_decay
        parameters.append(TrainedParameter(name, parameter, groups[index].lr_factor, weight_decay))
    for index, group in enumerate(config.param_groups):
        if not matches[index]:
            raise InputError(
                f"optimizer.param_groups: found no parameter for the pattern {group.pattern!r} that an earlier one "
                f"does not match; expected a regular expression for names such as {parameters[-1].name}"
            )
    return parameters


def describe_optimizers(optimizers: Optimizers) -> str:
    """A line for the log: the parameters of each group and their settings."""
    lines = []
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            millions = sum(parameter.numel() for parameter in group["params"]) / 1e6
            lines.append(
                f"{type(optimizer).__name__} of {len(group['params'])} tensors ({millions:.2f} M) with "
                f"weight_decay={group['weight_decay']:g} lr_factor={group['lr_factor']:g}"
            )
    return f"optimizer: {'; '.join(lines)}"


def set_learning_rate(optimizers: Optimizers, step: int, config: Config) -> float:
    """Set the rates of the update after `step` updates: the schedule's, times the `lr_factor` of each group.

    Returns:
        The schedule's rate. The step alone decides it: accelerate's own scheduler advances once per process.
    """
    params = config.lr_scheduler.params
    schedule = SCHEDULES[config.lr_scheduler.scheduler]
    lr = schedule(
        step,
        peak=params.learning_rate,
        warmup_steps=params.warmup_steps,
        max_steps=config.training.max_train_steps,
        end_lr=params.end_lr,
    )
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
    return lr


class MovingAverage(Generic[M]):
    """Exponential moving average of all parameters, starting from their current values. (torch's AveragedModel starts
    from the values after the first update.)

    Args:
        decay: per update, once warm; see `utils.schedules.ema_decay`.

    Attributes:
        module: a copy of the model with the averages, in eval mode.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.module = deepcopy(model).eval()
        self.decay = decay

    def update(self, model: M, age: int) -> None:
        """Add the parameters of the model after an update. Both may be sharded, in the same way.

        Args:
            age: steps since the average began.
        """
        if hasattr(self.module, "reshard"):  # FSDP keeps the root's parameters gathered after a forward pass
            self.module.reshard()  # type: ignore[operator]
        add = get_ema_multi_avg_fn(ema_decay(age, self.decay))
        add(list(self.module.parameters()), list(model.parameters()), None)
