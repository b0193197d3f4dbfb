"""Learning-rate schedules as pure functions of the step."""

import math


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int, end_lr: float) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `end_lr` at `max_steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return end_lr + (peak - end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
