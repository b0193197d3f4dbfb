"""Optimizer, learning rate and moving average of the weights.

A new optimizer is a function like `adamw`, a line in `OPTIMIZERS`, and its name among the choices of `optimizer.name`.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.config import Config
from utils.schedules import SCHEDULES
from utils.schema import OptimizerParams

M = TypeVar("M", bound=nn.Module)
# (groups of parameters with their weight decay, settings, all on a GPU) -> optimizer
Optimizer = Callable[[list[dict[str, Any]], OptimizerParams, bool], torch.optim.Optimizer]


def adamw(groups: list[dict[str, Any]], params: OptimizerParams, on_gpu: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=(params.beta1, params.beta2), fused=on_gpu)


OPTIMIZERS: dict[str, Optimizer] = {"adamw": adamw}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of `optimizer.name`, with weight decay on matrices only; the model's `no_weight_decay()` names
    further exceptions."""
    params = config.optimizer.params
    excluded = model.no_weight_decay()  # type: ignore[operator]  # timm's convention, not of nn.Module
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim <= 1 or name in excluded else decayed).append(parameter)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": params.weight_decay}]
    return OPTIMIZERS[config.optimizer.name](groups, params, next(model.parameters()).is_cuda)


class MovingAverage(Generic[M]):
    """Exponential moving average of all parameters, starting from their present values. (torch's AveragedModel starts
    from the values after the first update.)

    Attributes:
        module: a copy of the model with the averages, in eval mode.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.module = deepcopy(model).eval()
        self._add = get_ema_multi_avg_fn(decay)

    def update(self, model: M) -> None:
        """Add the parameters of the model after an update. Both may be sharded, in the same way."""
        if hasattr(self.module, "reshard"):  # FSDP keeps the root's parameters gathered after a forward pass
            self.module.reshard()  # type: ignore[operator]
        self._add(list(self.module.parameters()), list(model.parameters()), None)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    """Set the rate of the update after `step` updates, and return it. The step decides alone: accelerate's own
    scheduler advances once per process."""
    schedule, params = SCHEDULES[config.lr_scheduler.scheduler], config.lr_scheduler.params
    lr = schedule(step, params.learning_rate, params.warmup_steps, config.training.max_train_steps, params.end_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
