"""The interface of all frozen image encoders: images to features of patches and of whole images.

Legend: B images, H = W pixels, g x g patches, Z width of the features of a patch, D width of the features of an image.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenEncoder(nn.Module, ABC):
    """Without gradients, in eval mode.

    Attributes:
        name: name of the network, for logs and reports.
        patch_dim: Z; image_dim: D.
        packages: packages that the features depend on.
        weights_name: file name of the weights.
        weights_sha256: hash of that file.
    """

    name: str
    patch_dim: int
    image_dim: int
    packages: tuple[str, ...]
    weights_name: str
    weights_sha256: str

    @abstractmethod
    def _patch_features(self, images: Tensor) -> Tensor:
        """`patch_features`, in the precision of the context."""

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """`image_features` of floats (B, 3, H, W) from 0 to 255."""

    @torch.no_grad()
    def patch_features(self, images: Tensor) -> Tensor:
        """(B, g * g, Z) in raster order of images (B, 3, H, W) in [0, 1]; on CUDA in bf16, on a CPU in float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            return self._patch_features(images)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D) float32, computed in float32, of uint8 images (B, H, W, 3)."""
        return self._image_features(pixels.permute(0, 3, 1, 2).float())

    def __str__(self) -> str:
        return f"{self.name}, sha256 {self.weights_sha256[:12]}..."


def on_grid(maps: Tensor, grid_size: int) -> Tensor:
    """Feature maps (B, Z, h, w), resampled to g x g: (B, g * g, Z) in raster order."""
    if maps.shape[2:] != (grid_size, grid_size):
        maps = F.interpolate(maps, (grid_size, grid_size), mode="bilinear", antialias=True)
    return maps.flatten(2).mT
