"""The precision of float32 matrix products on NVIDIA GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Inside, float32 matrix products and convolutions run in TF32 (10 bits of mantissa) or in full precision.

    What was set before holds again afterwards. Without an NVIDIA GPU it changes nothing.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = tf32
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
