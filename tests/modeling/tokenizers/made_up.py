"""Tokenizer weights and images by formula: those of the expected numbers in tests/fixtures."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def formula_weight(key: str, shape: tuple[int, ...], seed: int = 11) -> Tensor:
    draw = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape).astype(np.float32)
    if len(shape) == 1 and key.endswith("weight"):  # of a norm
        draw = 1 + 0.1 * draw
    elif len(shape) >= 2 and key.endswith("weight") and "embedding" not in key:
        draw = draw * np.float32(np.prod(shape[1:]) ** -0.5)
    else:
        draw = draw * np.float32(0.02 if len(shape) == 1 else 0.5)
    return torch.from_numpy(draw)


def set_formula_weights(module: nn.Module, seed: int) -> None:
    for key, value in module.state_dict().items():
        value.copy_(formula_weight(key, tuple(value.shape), seed))


def formula_images(seed: int, count: int, edge: int) -> Tensor:
    """(count, 3, edge, edge) in [0, 1]."""
    random = np.random.RandomState(seed)
    low = random.rand(count, 3, 4, 4).repeat(edge // 4, axis=2).repeat(edge // 4, axis=3)
    return torch.from_numpy(np.clip(0.75 * low + 0.25 * random.rand(count, 3, edge, edge), 0, 1).astype(np.float32))
