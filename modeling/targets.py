"""What the projections of taps should point at: for each code of an image, a vector.

A new target is a class like `Codebook`, in a file of its own, and a line in `TARGETS`: the names of `target` in
`model.generator.taps`.

Legend: B images, N codes per image, H x W pixels, V codebook size, Z width of a target vector.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from modeling.encoders.registry import open_encoder
from modeling.robust_embedding import Tap
from modeling.taps import tap_configs, taps_of
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import InputError
from utils.keys import ConfigError, did_you_mean
from utils.randomness import Stream, permutation, philox
from utils.schema import Config, GeneratorConfig, TapConfig


class Target(ABC):
    """
    Attributes:
        needs_images: the batches must have images.
        of_training_samples: there are vectors for the samples of the training data only.
        z_dim: Z.
        description: for the log.
    """

    needs_images: ClassVar[bool] = False
    of_training_samples: ClassVar[bool] = False
    z_dim: int
    description: str

    @abstractmethod
    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        """On the device of the tokenizer; `num_samples` is the size of the training data, if known. Raises InputError
        if something is missing or does not fit."""

    @abstractmethod
    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Target vectors (B, N, Z), without gradients.

        Args:
            codes: (B, N) clean codes in raster order.
            batch: on the device: `index` (B,) of the samples in the data and, if needed, `image` (B, 3, H, W).
        """


class Codebook(Target):
    """The tokenizer's vector of each code: the paper's embedding regularization."""

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        self.tokenizer = tokenizer
        self.z_dim = tokenizer.codebook_dim
        self.description = "codebook vectors"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return self.tokenizer.codebook_lookup(codes)


class PermutedCodebook(Codebook):
    """The codebook vectors in a fixed random order: the vector of another code. A control with the loss and the cost of
    `Codebook`, whose geometry says nothing about the codes."""

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        super().__init__(tap, config, tokenizer, num_samples)
        bits = philox(Stream.CODEBOOK_PERMUTATION, config.training.seed, 0)
        order = permutation(bits, tokenizer.codebook_size).astype(np.int64)
        self.permutation = torch.from_numpy(order).to(next(tokenizer.parameters()).device)  # (V,)
        self.description = f"codebook vectors, permuted by training.seed={config.training.seed}"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return super().vectors(self.permutation[codes], batch)


class EncoderFeatures(Target):
    """Patch features of a frozen image encoder, `source`, on the grid of the codes: REPA
    (https://arxiv.org/abs/2410.06940)."""

    needs_images = True

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        if tap.source is None:
            raise ConfigError(f"{_key(tap)}: found no source, expected efficientnet_lite0 or timm:NAME[:FILE]")
        grid = tokenizer.code_shape
        if len(grid) != 2 or grid[0] != grid[1]:
            raise ConfigError(
                f"{_key(tap)}: found codes of shape {grid} (model.vq_model.model_type={tokenizer.model_type}), "
                "expected a square grid, so that each code has a patch"
            )
        self.encoder = open_encoder(tap.source, grid_size=grid[0]).to(next(tokenizer.parameters()).device)
        self.z_dim = self.encoder.patch_dim
        self.description = f"features of {self.encoder}"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return self.encoder.patch_features(batch["image"])


class StoredFeatures(Target):
    """Vectors in a file, `source`: a .npy of (n, N, Z) or, equal for all codes of an image, (n, Z), with a row for each
    sample of the training data in their order. It is memory-mapped."""

    of_training_samples = True

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        if tap.source is None:
            raise ConfigError(f"{_key(tap)}: found no source, expected an .npy file")
        try:
            self.rows = np.load(Path(tap.source), mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{tap.source}: cannot be read as an .npy file: {str(error).splitlines()[0]}") from error
        shape, count = self.rows.shape, tokenizer.image_seq_len
        if self.rows.dtype.kind != "f" or len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != count):
            raise InputError(
                f"{tap.source}: found {self.rows.dtype} {shape}, expected floats (n, {count}, Z) or (n, Z)"
            )
        if num_samples not in (None, shape[0]):
            raise InputError(
                f"{tap.source}: found {shape[0]} rows, expected {num_samples}, one for each training sample"
            )
        self.z_dim = shape[-1]
        self.description = f"{tap.source}, {shape}"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        rows = torch.from_numpy(self.rows[batch["index"].cpu().numpy()]).to(codes.device)
        return rows if rows.ndim == 3 else rows[:, None].expand(-1, codes.shape[1], -1)


TARGETS: dict[str, type[Target]] = {
    "codebook": Codebook,
    "permuted_codebook": PermutedCodebook,
    "encoder": EncoderFeatures,
    "stored": StoredFeatures,
}


class Targets:
    """The targets of all taps of a config; taps with the same target and source share one.

    Args:
        tokenizer: on the device of training.
        num_samples: size of the training data; None: unknown.

    Attributes:
        taps: that are trained, in the order of the loss.

    Raises:
        InputError: an unknown or unfit target, or missing weights.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, num_samples: int | None = None) -> None:
        self.taps = taps_of(config.model.generator)
        shared: dict[tuple[str, str | None], Target] = {}
        self.by_tap: dict[str, Target] = {}
        for settings, tap in zip(tap_configs(config.model.generator), self.taps, strict=True):
            key = settings.target, settings.source
            if key not in shared:
                shared[key] = target_class(settings)(settings, config, tokenizer, num_samples)
            self.by_tap[tap.name] = shared[key]
            if tap.z_dim != shared[key].z_dim:
                raise ConfigError(
                    f"{_key(settings)}: found z_dim={tap.z_dim}, expected {shared[key].z_dim}, the width of its target"
                )

    def active(self, step: int) -> list[Tap]:
        """The taps that have not ended at this step."""
        return [tap for tap in self.taps if tap.end_step is None or step < tap.end_step]

    @torch.no_grad()
    def __call__(
        self, taps: Sequence[Tap], codes: Tensor, batch: Mapping[str, Tensor], orders: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Target vectors (B, N, Z) by tap.

        Args:
            codes: (B, N) clean codes in raster order.
            batch: as for `Target.vectors`.
            orders: (B, N), the codes 0 to N - 1 in the order of the results; None: raster.
        """
        vectors: dict[Target, Tensor] = {}
        for target in dict.fromkeys(self.by_tap[tap.name] for tap in taps):
            found = target.vectors(codes, batch)
            if orders is not None:
                found = found.gather(1, orders[..., None].expand(-1, -1, found.shape[2]))
            vectors[target] = found
        return {tap.name: vectors[self.by_tap[tap.name]] for tap in taps}

    def describe(self) -> str:
        """A line for the log."""
        lines = [
            f"{tap.name} (block {tap.block}, {tap.positions}, weight {tap.weight:g}) to "
            f"{self.by_tap[tap.name].description}"
            for tap in self.taps
        ]
        return f"alignment taps: {'; '.join(lines) or 'none'}"


def target_class(tap: TapConfig) -> type[Target]:
    """Raises ConfigError for an unknown name."""
    if tap.target not in TARGETS:
        near = did_you_mean(difflib.get_close_matches(tap.target, TARGETS, 1, 0.3))
        raise ConfigError(f"{_key(tap)}: found target {tap.target!r}, expected {', '.join(TARGETS)}{near}")
    return TARGETS[tap.target]


def need_images(generator: GeneratorConfig) -> list[str]:
    """Names of the taps whose targets need images."""
    return [tap.name for tap in tap_configs(generator) if target_class(tap).needs_images]


def _key(tap: TapConfig) -> str:
    return f"model.generator.taps: {tap.name!r}"
