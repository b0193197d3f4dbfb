"""The simplest tokenizer: k-means of raw pixel patches. A trained one with as many tokens and codebook entries must
reconstruct images better.

Legend: B images, H x W pixels, N tokens per image, V codebook size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.kmeans import k_means


class PatchBaseline:
    """
    Args:
        images: (B, 3, H, W) in [0, 1], of the training set.
        grid_size: edge of the grid of tokens, which divides H = W; N is its square.
        codebook_size: V.
    """

    def __init__(self, images: Tensor, grid_size: int, codebook_size: int, seed: int = 0) -> None:
        self.patch_size = images.shape[-1] // grid_size
        self.centres = k_means(self._patches(images).flatten(0, 1), codebook_size, seed)  # (V, 3 p^2)

    def _patches(self, images: Tensor) -> Tensor:
        return F.unfold(images, kernel_size=self.patch_size, stride=self.patch_size).mT  # (B, N, 3 p^2)

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, 3, H, W) of images (B, 3, H, W) in [0, 1], and tokens (B, N)."""
        patches = self._patches(images)
        codes = torch.cdist(patches, self.centres[None]).argmin(dim=2)
        return F.fold(
            self.centres[codes].mT, images.shape[-2:], kernel_size=self.patch_size, stride=self.patch_size
        ), codes
