"""Schedules as pure functions of the step."""

import math

from utils.schema import GeneratorConfig


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int, end_lr: float) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `end_lr` at `max_steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return end_lr + (peak - end_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def perturbation_ratio_at(step: int, anneal_start: int, anneal_end: int) -> float:
    """Largest share of codes that are replaced: 1 until `anneal_start`, linear to 0 at `anneal_end`, 0 after.

    Each sequence draws its own share from U(0, this). With 0 and 3/4 of the steps it is the paper's
    f(t) = max(0, 1 - 4t/3).
    """
    if step >= anneal_end:
        return 0.0
    return min(1.0, (anneal_end - step) / max(1, anneal_end - anneal_start))


def perturbation_ratio(step: int, generator: GeneratorConfig) -> float:
    """`perturbation_ratio_at` as the config says; 0 for the plain AR model."""
    if generator.perturb_mode == "none":
        return 0.0
    return perturbation_ratio_at(step, generator.randomness_anneal_start, generator.randomness_anneal_end)
