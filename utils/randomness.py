"""Counter-based randomness: what is drawn depends on keys only, never on ranks, batch sizes or earlier draws.

Philox is a counter-based generator (Salmon et al., SC 2011), so a slice of a long stream is reached in O(1).
"""

import numpy as np
import torch


def sample_uniforms(seed: int, step: int, first: int, count: int, width: int) -> torch.Tensor:
    """Uniforms of the samples `first` to `first + count - 1` of the global batch of a training step.

    Returns:
        (count, width) float32 in [0, 1).
    """
    row = -(-width // 4) * 4  # Philox advances in blocks of 4 doubles
    bits = np.random.Philox(key=[seed, step]).advance(first * row // 4)
    draws = np.random.Generator(bits).random((count, row))[:, :width]
    return _to_float32(draws)


def image_uniforms(seed: int, indices: list[int], width: int) -> torch.Tensor:
    """Uniforms of the images with these indices, for sampling.

    Returns:
        (len(indices), width) float32 in [0, 1).
    """
    draws = [np.random.Generator(np.random.Philox(key=[seed, index])).random(width) for index in indices]
    return _to_float32(np.stack(draws))


def _to_float32(draws: np.ndarray) -> torch.Tensor:
    # Rounding to float32 may give 1.0, which is outside [0, 1).
    return torch.from_numpy(np.minimum(draws, 1 - 2**-24).astype(np.float32))


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of the default generators for one forward pass, so that dropout needs no saved generator state."""
    return int(np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)[0] >> 1)
