"""Tokenizer weights by formula: those of maskgitvq_expected.npz."""

import zlib

import numpy as np
import torch
from torch import Tensor


def formula_weight(key: str, shape: tuple[int, ...], seed: int = 11) -> Tensor:
    draw = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape).astype(np.float32)
    if "norm" in key and key.endswith("weight"):
        draw = 1 + 0.1 * draw
    elif len(shape) >= 2 and key.endswith("weight") and "embedding" not in key:
        draw = draw * np.float32(np.prod(shape[1:]) ** -0.5)
    else:
        draw = draw * np.float32(0.02 if len(shape) == 1 else 0.5)
    return torch.from_numpy(draw)
