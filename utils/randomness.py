"""Counter-based randomness: numbers depend on keys only, never on ranks, batch sizes or earlier draws.

Philox is a counter-based generator (Salmon et al., SC 2011), so any part of a long stream is reached in O(1). All
numbers are computed here from its bits, since the methods of NumPy's Generator may change between releases.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Uses of random numbers, which are independent for equal seed and key."""

    TRAINING_NOISE = 0
    DATA_ORDER = 1
    AUGMENTATION = 2
    SAMPLING = 3
    SHARDS = 4
    VALIDATION = 5
    TRAINING_ORDERS = 6
    SAMPLING_ORDERS = 7
    REFERENCE_HALVES = 8
    CODEBOOK_PERMUTATION = 9
    ANALYSIS = 10


def philox(stream: Stream, seed: int, key: int) -> np.random.Philox:
    """The bit generator of (stream, seed, key); the stream is the highest word of the 256-bit counter."""
    return np.random.Philox(key=[seed, key], counter=[0, 0, 0, stream])


def uniforms(bits: np.random.Philox, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1)."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def permutation(bits: np.random.Philox, count: int) -> np.ndarray:
    """The numbers from 0 to count - 1 in a random order: (count,) uint32."""
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.uint32)


def sample_uniforms(
    seed: int, step: int, slots: Sequence[int] | np.ndarray, width: int, stream: Stream = Stream.TRAINING_NOISE
) -> torch.Tensor:
    """Uniforms of the samples in these slots of the global batch of a training step: (number of slots, width) float32
    in [0, 1)."""
    blocks = -(-width // 4)  # Philox advances in blocks of 4 doubles
    bits = (philox(stream, seed, step).advance(int(slot) * blocks) for slot in slots)
    return _to_float32(np.stack([uniforms(of_slot, width) for of_slot in bits]))


@dataclass(frozen=True)
class TrainingUniforms:
    """Random numbers in [0, 1) of B samples at a step, float32."""

    label_dropout: torch.Tensor  # (B,)
    perturbation: torch.Tensor  # (B, num_perturbation)
    orders: torch.Tensor | None  # (B, num_orders)


def training_uniforms(
    seed: int, step: int, slots: Sequence[int] | np.ndarray, num_perturbation: int, num_orders: int
) -> TrainingUniforms:
    """Random numbers of the samples in these slots of the global batch. Orders have their own stream, so the other
    numbers are the same for any order.

    Args:
        num_perturbation, num_orders: numbers per sample; 0 orders: None.
    """
    width = 1 + num_perturbation
    numbers = sample_uniforms(seed=seed, step=step, slots=slots, width=width, stream=Stream.TRAINING_NOISE)
    orders = None
    if num_orders:
        orders = sample_uniforms(seed=seed, step=step, slots=slots, width=num_orders, stream=Stream.TRAINING_ORDERS)
    return TrainingUniforms(label_dropout=numbers[:, 0], perturbation=numbers[:, 1:], orders=orders)


def image_uniforms(seed: int, indices: list[int], width: int, stream: Stream = Stream.SAMPLING) -> torch.Tensor:
    """Uniforms of the images with these indices, for sampling: (len(indices), width) float32 in [0, 1)."""
    return _keyed_uniforms(stream, seed, indices, width)


def validation_uniforms(rows: Iterable[int], width: int) -> torch.Tensor:
    """Uniforms of these rows of the validation codes, independent of the run's seed: (number of rows, width) float32 in
    [0, 1)."""
    return _keyed_uniforms(Stream.VALIDATION, 0, rows, width)


def _keyed_uniforms(stream: Stream, seed: int, keys: Iterable[int], width: int) -> torch.Tensor:
    return _to_float32(np.stack([uniforms(philox(stream, seed, key), width) for key in keys]))


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of the default generators for one forward pass, so that dropout needs no saved generator state."""
    return int(np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)[0]) >> 1


def _to_float32(draws: np.ndarray) -> torch.Tensor:
    # Rounding to float32 may give 1.0, which is outside [0, 1).
    return torch.from_numpy(np.minimum(draws, 1 - 2**-24).astype(np.float32))
