"""Feature extractors, the back ends of the evaluator: their interface, and frozen encoders.

Legend: B images, D width of the pooled features.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modeling.encoders.registry import open_encoder


@dataclass
class Features:
    pool: Tensor  # (B, D) float32
    spatial: Tensor | None = None  # (B, 2023) float32, for sFID
    log_probs: Tensor | None = None  # (B, 1008) float64, for the Inception Score


class Extractor(Protocol):
    """A frozen network and the origin of its weights."""

    pool_dim: int  # D, width of `Features.pool`
    spatial_dim: int | None  # width of `Features.spatial`; None: no such features
    n_classes: int | None  # width of `Features.log_probs`; None: no such features
    packages: tuple[str, ...]  # whose versions the report states
    weights_name: str  # file name
    weights_sha256: str

    @property
    def caveat(self) -> str | None:
        """A warning about these weights for the report, if any."""

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, H, W, 3) on the extractor's device."""


class EncoderFeatures:
    """The features of whole images of a frozen encoder.

    Args:
        name: as for `open_encoder`, whose errors it raises.
    """

    spatial_dim: int | None = None
    n_classes: int | None = None
    caveat: str | None = None

    def __init__(self, name: str, device: torch.device) -> None:
        self.encoder = open_encoder(name).to(device)
        self.pool_dim = self.encoder.image_dim
        self.packages = self.encoder.packages
        self.weights_name, self.weights_sha256 = self.encoder.weights_name, self.encoder.weights_sha256

    def __call__(self, images: Tensor) -> Features:
        """(B, H, W, 3) uint8 -> pool (B, D)."""
        return Features(self.encoder.image_features(images))
