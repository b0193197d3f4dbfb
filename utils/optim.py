"""Optimizer and learning rate from the config."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from utils.config import Config
from utils.schedules import learning_rate_at


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; the model's `no_weight_decay()` names further exceptions."""
    params = config.optimizer.params
    groups = param_groups_weight_decay(model, params.weight_decay, no_weight_decay_list=model.no_weight_decay())  # type: ignore[operator]
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=(params.beta1, params.beta2), fused=on_gpu)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    """Set the rate of the update after `step` updates. The step decides alone: accelerate's own scheduler advances
    once per process."""
    schedule = config.lr_scheduler.params
    lr = learning_rate_at(
        step, schedule.learning_rate, schedule.warmup_steps, config.training.max_train_steps, schedule.end_lr
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
