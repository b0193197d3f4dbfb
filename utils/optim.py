"""Optimizer and learning rate from the config.

A new optimizer is a function like `adamw`, a line in `OPTIMIZERS`, and its name among the choices of `optimizer.name`.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from utils.config import Config
from utils.schedules import SCHEDULES
from utils.schema import OptimizerParams

# (groups of parameters with their weight decay, settings, all on a GPU) -> optimizer
Optimizer = Callable[[list[dict[str, Any]], OptimizerParams, bool], torch.optim.Optimizer]


def adamw(groups: list[dict[str, Any]], params: OptimizerParams, on_gpu: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=(params.beta1, params.beta2), fused=on_gpu)


OPTIMIZERS: dict[str, Optimizer] = {"adamw": adamw}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of `optimizer.name`, with weight decay on matrices only; the model's `no_weight_decay()` names
    further exceptions."""
    params = config.optimizer.params
    groups = param_groups_weight_decay(model, params.weight_decay, no_weight_decay_list=model.no_weight_decay())
    return OPTIMIZERS[config.optimizer.name](groups, params, next(model.parameters()).is_cuda)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    """Set the rate of the update after `step` updates, and return it. The step decides alone: accelerate's own
    scheduler advances once per process."""
    schedule, params = SCHEDULES[config.lr_scheduler.scheduler], config.lr_scheduler.params
    lr = schedule(step, params.learning_rate, params.warmup_steps, config.training.max_train_steps, params.end_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
