"""Images of classes from Python, as scripts/sample_imagenet_rear.py samples them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modeling.rear import ReAR
from modeling.sampling.image_sampler import ImageSampler
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config_checks import check_ranges
from utils.precision import matmul_precision
from utils.schema import Config, SamplingConfig


def generate_images(
    model: ReAR,
    tokenizer: Tokenizer,
    class_labels: Sequence[int] | Tensor,
    *,
    guidance_scale: float | None = None,
    guidance_scale_pow: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 42,
    order: Literal["raster", "random"] = "raster",
    batch_size: int = 50,
    sampler: ImageSampler | None = None,
) -> np.ndarray:
    """Sample an image of each class label: in bf16 and with CUDA graphs on a GPU, in float32 on a CPU. Image i depends
    on (weights, settings, seed, i, its label) only; with labels 0, 1, .., C - 1, 0, 1, .. it is the script's image i.

    Args:
        model, tokenizer: on the same device, in eval mode.
        class_labels: (n,) from 0 to C - 1, or `model.null_class`.
        guidance_scale, guidance_scale_pow, temperature, top_k, top_p: None: as in `model.config.generator`.
        order: random: for models that were trained with random orders.
        batch_size: images at a time.
        sampler: one of this model to reuse, with its own batch size, since on a GPU a new one takes seconds to prepare:
            `ImageSampler(model, tokenizer, Config(model=model.config), batch_size)`.

    Returns:
        (n, H, W, 3) uint8; tokens (n, N) uint16 or uint32 if the tokenizer has no images.

    Raises:
        ValueError: no labels, or an argument outside its range.
        NonFiniteError: logits or pixels that are not finite.
    """
    labels = torch.as_tensor(class_labels).cpu()
    if len(labels) == 0:
        raise ValueError("class_labels=[]: expected at least one")
    settings: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "guidance_scale_pow": guidance_scale_pow,
        "randomize_temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    generator = replace(model.config.generator, **given)
    config = Config(model=replace(model.config, generator=generator), sampling=SamplingConfig(seed=seed, order=order))
    check_ranges(config.model.generator, "model.generator.")
    check_ranges(config.sampling, "sampling.")
    if sampler is None:
        sampler = ImageSampler(model, tokenizer, config, min(batch_size, len(labels)))
    if sampler.model is not model:
        raise ValueError("sampler: of another model, expected one of the given model")
    sampler.configure(config)
    batches = torch.arange(len(labels)).split(sampler.batch_size)
    steps = len(batches) * model.image_seq_len
    with matmul_precision(tf32=True), tqdm(desc="sampling", total=steps, unit="token", delay=1) as progress:
        return np.concatenate([sampler(rows.tolist(), labels[rows], progress.update) for rows in batches])
