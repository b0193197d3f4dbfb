"""Learning-rate schedules and the decay of the EMA as pure functions of the step.

A new schedule is a function like `cosine`, a line in `SCHEDULES`, and its name among the choices of
`lr_scheduler.scheduler`.
"""

import math
from typing import Protocol

from utils.schema import Config


class Schedule(Protocol):
    def __call__(self, step: int, *, peak: float, warmup_steps: int, max_steps: int, end_lr: float) -> float:
        """The learning rate of the update after `step` updates."""


def cosine(step: int, *, peak: float, warmup_steps: int, max_steps: int, end_lr: float) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `end_lr` at `max_steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return end_lr + (peak - end_lr) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Schedule] = {"cosine": cosine}


def ema_decay(age: int, decay: float) -> float:
    """Decay of the update of an EMA that began `age` steps before: it rises to `decay`, so that a short run forgets its
    initialization.

    Source: RAR's and TiTok's trainer (https://github.com/bytedance/1d-tokenizer, modeling/modules/ema_model.py).
    """
    return min(decay, (1 + age) / (10 + age))


def ema_warm_up(decay: float) -> int:
    """The age at which `ema_decay` reaches `decay`."""
    return max(0, math.ceil((10 * decay - 1) / (1 - decay)))


def schedule_warnings(config: Config) -> list[str]:
    """A line for each schedule that ends after the run, as when a published recipe runs for a few steps."""
    generator, end = config.model.generator, config.training.max_train_steps
    steps = {"lr_scheduler.params.warmup_steps": config.lr_scheduler.params.warmup_steps}
    if generator.perturb_mode != "none":
        steps["model.generator.randomness_anneal_end"] = generator.randomness_anneal_end
    if generator.order == "annealed":
        steps["model.generator.order_anneal_end"] = generator.order_anneal_end
    return [
        f"{key}={value} is beyond training.max_train_steps={end}: this schedule does not end within the run"
        for key, value in steps.items()
        if value > end > 0
    ]
