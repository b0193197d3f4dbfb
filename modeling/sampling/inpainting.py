"""Inpainting and outpainting: some codes of an image are given, the others are sampled conditioned on them.

Legend: n images, K completions of each, N codes per image.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_sampler import image_orders
from utils.randomness import image_uniforms
from utils.schema import Config


def region_mask(name: str, share: float, rows: int, columns: int) -> np.ndarray:
    """Mask (rows, columns) bool of a region of the grid of codes, by the names of `completion.keep`."""
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    from_center = 2 * np.maximum(abs(y - 0.5), abs(x - 0.5))  # 1 at the edge
    regions = {"top": y < share, "left": x < share, "center": from_center < share, "border": from_center > 1 - share}
    return regions[name]


def inpaint(
    codes: Tensor,
    mask: Tensor,
    sampler: CodeSampler,
    config: Config,
    num_completions: int,
    class_label: int | None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Completions (n, K, N), K = num_completions, of codes (n, N), both on the CPU.

    Args:
        mask: (N,) bool, true where a code is given.
        sampler: is configured for this.
        class_label: class of all images; None: the null class, without guidance.
        on_step: called for each position of each batch.

    Raises:
        ValueError: given codes that a model in raster order cannot be conditioned on.
    """
    n, length = codes.shape
    sampling = config.sampling
    generator = config.model.generator
    if class_label is None:
        class_label = sampler.model.null_class
        generator = replace(generator, guidance_scale=1.0)  # guidance would compare the null class with itself
    sampler.configure(generator)

    images = list(range(n))
    seeds = range(sampling.seed, sampling.seed + num_completions)
    uniforms = torch.stack([image_uniforms(seed, images, length) for seed in seeds], dim=1)  # (n, K, N)
    orders = None
    if sampling.order != "raster":
        by_seed = (image_orders(images, length, replace(sampling, seed=seed)) for seed in seeds)
        orders = torch.stack([one for one in by_seed if one is not None], dim=1)  # (n, K, N)

    total = n * num_completions
    batch_size = min(total, sampling.per_gpu_batch_size)
    completed = []
    for rows in torch.arange(total).split(batch_size):
        padded = rows.new_full((batch_size,), total - 1)  # another batch size would be compiled again
        padded[: len(rows)] = rows
        image, k = padded // num_completions, padded % num_completions
        sampled = sampler(
            torch.full((batch_size,), class_label),
            uniforms[image, k],
            on_step=on_step,
            orders=None if orders is None else orders[image, k],
            conditioning_codes=codes[image],
            conditioning_mask=mask.expand(batch_size, -1),
        )
        completed.append(sampled[: len(rows)].cpu())
    return torch.cat(completed).view(n, num_completions, length)
