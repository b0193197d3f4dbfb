"""Precision: bf16, float32, or TF32 in float32 products on NVIDIA GPUs; deterministic operations."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.schema import TrainingConfig


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Inside, float32 matrix products and convolutions run in TF32 (10 bits of mantissa) or in full precision.

    The previous setting is restored. No effect without an NVIDIA GPU.
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


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, operations are deterministic (bit-equal each time) or may be not, which is faster; an operation without a
    deterministic form is a RuntimeError, on a CPU too. The previous setting is restored.

    Enter it before CUDA is used: cuBLAS reads CUBLAS_WORKSPACE_CONFIG once.
    """
    cudnn, variable = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    before, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(variable)
    mode = torch.get_deterministic_debug_mode()  # off (0), warn or error (2)
    changes = mode != (2 if wanted else 0)  # a redundant call would import torch's compiler, for seconds
    try:
        if changes:
            torch.use_deterministic_algorithms(wanted)
        cudnn.deterministic, cudnn.benchmark = wanted, cudnn.benchmark and not wanted
        if wanted:
            os.environ.setdefault(variable, ":4096:8")
        yield
    finally:
        if changes:
            torch.set_deterministic_debug_mode(mode)
        cudnn.deterministic, cudnn.benchmark = before
        if workspace is None:
            os.environ.pop(variable, None)


@contextmanager
def exact_attention_dropout() -> Iterator[None]:
    """Inside, attention does not use cuDNN's kernel, which rounds the probability of dropout to a multiple of 1/16.
    Newer releases of torch avoid it (https://github.com/pytorch/pytorch/pull/174245). The previous setting is restored.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def in_bf16(training: TrainingConfig, device: torch.device) -> bool:
    """Whether `training.mixed_precision` selects bf16 on this device."""
    return training.mixed_precision == "bf16" or (training.mixed_precision == "auto" and device.type == "cuda")


def autocast(training: TrainingConfig, device: torch.device) -> torch.autocast:
    """The context of a forward pass in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(training, device))
