"""Targets by name, and the targets of all taps of a config.

Legend: B images, N codes per image, Z width of a target vector.
"""

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modeling.robust_embedding import Tap
from modeling.taps import tap_configs, taps_of
from modeling.targets.codebook import Codebook, PermutedCodebook
from modeling.targets.encoder_features import EncoderFeatures
from modeling.targets.stored_features import StoredFeatures
from modeling.targets.target import Target, key_of
from modeling.tokenizers.tokenizer import Tokenizer
from utils.keys import ConfigError, did_you_mean
from utils.schema import Config, GeneratorConfig, TapConfig

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
        taps: the trained taps, in the order of the loss.

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
            width = shared[key].z_dim
            if tap.z_dim != width:
                raise ConfigError(
                    f"{key_of(settings)}: found z_dim={tap.z_dim}, expected {width}, the width of its target"
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
        raise ConfigError(f"{key_of(tap)}: found target {tap.target!r}, expected {', '.join(TARGETS)}{near}")
    return TARGETS[tap.target]


def need_images(generator: GeneratorConfig) -> list[str]:
    """Names of the taps whose targets need images."""
    return [tap.name for tap in tap_configs(generator) if target_class(tap).needs_images]
