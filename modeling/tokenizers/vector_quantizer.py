"""Quantization to the nearest vector of a codebook (VQ-VAE, https://arxiv.org/abs/1711.00937).

Legend: B images, h x w grid of codes, N = h * w codes per image in raster order, V codebook size, Z width of a vector.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass
class QuantizerOutput:
    """What training needs of the quantizer."""

    quantized: Tensor  # (B, Z, h, w) codebook vectors; gradients pass straight through to the features
    codes: Tensor  # (B, N) int64
    codebook_loss: Tensor  # mean squared distance, moves the codebook
    commitment_loss: Tensor  # the same number, moves the encoder


class VectorQuantizer(nn.Module):
    """The codebook; a feature goes to the nearest of its vectors."""

    def __init__(self, codebook_size: int, token_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, token_size)

    def nearest(self, features: Tensor) -> Tensor:
        """Codes (B, N) int64 of features (B, N, Z), by squared distance in float32."""
        flat = features.flatten(0, 1).float()  # (B N, Z)
        codebook = self.embedding.weight.float()
        with torch.autocast(flat.device.type, enabled=False):
            # The features' own squared norm is the same for all codes and left out.
            distances = torch.addmm(codebook.square().sum(dim=1), flat, codebook.T, alpha=-2)  # (B N, V)
        return distances.argmin(dim=1).view(features.shape[:2])

    def most_similar(self, features: Tensor) -> Tensor:
        """Codes (B, N) int64 of features (B, N, Z), by cosine in float32."""
        directions = F.normalize(self.embedding.weight.float(), dim=1)  # (V, Z)
        with torch.autocast(directions.device.type, enabled=False):
            return (features.float() @ directions.T).argmax(dim=-1)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize features (B, Z, h, w) with the straight-through gradient of VQ-VAE."""
        codes = self.nearest(rearrange(features, "b z h w -> b (h w) z"))
        vectors = rearrange(self.embedding(codes), "b (h w) z -> b z h w", h=features.shape[2])
        features = features.float()
        return QuantizerOutput(
            quantized=features + (vectors - features).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(vectors, features.detach()),
            commitment_loss=F.mse_loss(features, vectors.detach()),
        )
