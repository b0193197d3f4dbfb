"""Completing images: some of their codes are given, the others are sampled.

Legend: n images, K completions of each, N codes per image.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_inputs import image_orders
from utils.randomness import image_uniforms
from utils.schema import Config


def in_region(name: str, share: float, rows: int, columns: int) -> np.ndarray:
    """Mask (rows, columns) bool of a region of the grid of codes, by the names of `completion.keep`."""
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    from_middle = 2 * np.maximum(abs(y - 0.5), abs(x - 0.5))  # 1 at the edge
    regions = {"top": y < share, "left": x < share, "center": from_middle < share, "border": from_middle > 1 - share}
    return regions[name]


def complete(
    codes: Tensor,
    kept: Tensor,
    sampler: CodeSampler,
    config: Config,
    num_completions: int,
    class_label: int | None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Codes (n, K, N), K = num_completions, of codes (n, N), both on the CPU.

    Args:
        kept: (N,) bool, the codes that stay.
        sampler: is configured for this.
        class_label: of all; None: the null class, without guidance.
        on_step: called for each position of each batch.

    Raises:
        ValueError: codes that a model in raster order cannot start from.
    """
    (n, length), sampling, generator = codes.shape, config.sampling, config.model.generator
    if class_label is None:  # guidance would compare the null class with itself
        generator = replace(generator, guidance_scale=1.0)
    label = sampler.weights.model.null_class if class_label is None else class_label
    sampler.configure(generator)
    samplings = [replace(sampling, seed=sampling.seed + k) for k in range(num_completions)]
    images = list(range(n))
    uniforms = torch.stack([image_uniforms(one.seed, images, length) for one in samplings], dim=1)  # (n, K, N)
    by_seed = [image_orders(images, length, one) for one in samplings]
    orders = torch.stack([one for one in by_seed if one is not None], dim=1) if sampling.order != "raster" else None
    found, total = [], n * len(samplings)
    for rows in torch.arange(total).split(size := min(total, sampling.per_gpu_batch_size)):
        filled = rows.new_full((size,), total - 1)  # to a whole batch, so that nothing is compiled anew
        filled[: len(rows)] = rows
        image, k = filled // len(samplings), filled % len(samplings)
        completed = sampler(
            torch.full((size,), label),
            uniforms[image, k],
            on_step,
            orders[image, k] if orders is not None else None,
            codes[image],
            kept.expand(size, -1),
        )
        found.append(completed[: len(rows)].cpu())
    return torch.cat(found).view(n, len(samplings), length)
