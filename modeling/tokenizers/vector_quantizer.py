"""Quantization to the nearest vector of a codebook (VQ-VAE, https://arxiv.org/abs/1711.00937).

Legend: B images, h x w grid of codes, N = h * w codes per image in raster order, V codebook size, Z width of a vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MOST_DISTANCES = 2**28  # at a time while looking up: 1 GiB; 1,024 images of 256 codes for V = 1,024, 64 for 16,384
ENTROPY_TEMPERATURE = 0.01  # of the distances, in `entropy_loss`
LEAST_PROBABILITY = 1e-5  # added to the mean probabilities, whose logarithm is taken


@dataclass
class QuantizerOutput:
    """What training needs of the quantizer."""

    quantized: Tensor  # (B, Z, h, w) codebook vectors; gradients pass straight through to the features
    codes: Tensor  # (B, N) int64
    codebook_loss: Tensor  # mean squared distance, moves the codebook
    commitment_loss: Tensor  # the same number, moves the encoder
    # makes those of `VectorQuantizer.distances`, (B N, V) float32: 1 GiB for 64 images of 256 codes and V = 16,384
    distances: Callable[[], Tensor]


class VectorQuantizer(nn.Module):
    """The codebook; a feature goes to the nearest of its vectors."""

    def __init__(self, codebook_size: int, token_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, token_size)

    def comparable(self, vectors: Tensor, dim: int) -> Tensor:
        """Features or codebook vectors, with Z at `dim`, in the form in which they are compared: as they are."""
        return vectors

    def vectors(self, codes: Tensor) -> Tensor:
        """Codebook vectors (B, N, Z) of codes (B, N), comparable."""
        return self.comparable(self.embedding(codes), dim=-1)

    def distances(self, features: Tensor) -> Tensor:
        """Squared distances (M, V) in float32 of comparable features (M, Z), but for the features' own squared norms,
        which are the same for all codes."""
        codebook = self.comparable(self.embedding.weight.float(), dim=1)
        with torch.autocast(features.device.type, enabled=False):
            return torch.addmm(codebook.square().sum(dim=1), features, codebook.T, alpha=-2)

    def nearest(self, features: Tensor) -> Tensor:
        """Codes (B, N) int64 of features (B, N, Z)."""
        flat = self.comparable(features.flatten(0, 1).float(), dim=1)  # (B N, Z)
        return self._nearest(flat).view(features.shape[:2])

    @torch.no_grad()
    def _nearest(self, features: Tensor) -> Tensor:
        """Codes (M,) int64 of comparable features (M, Z), some at a time: the distances never stand all in memory."""
        parts = features.split(max(1, MOST_DISTANCES // self.embedding.num_embeddings))
        return torch.cat([self.distances(part).argmin(dim=1) for part in parts])

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize features (B, Z, h, w) with the straight-through gradient of VQ-VAE."""
        features = self.comparable(features.float(), dim=1)
        flat = rearrange(features, "b z h w -> (b h w) z")
        codes = self._nearest(flat.detach()).view(len(features), -1)
        vectors = rearrange(self.vectors(codes), "b (h w) z -> b z h w", h=features.shape[2])
        return QuantizerOutput(
            quantized=features + (vectors - features).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(vectors, features.detach()),
            commitment_loss=F.mse_loss(features, vectors.detach()),
            distances=partial(self.distances, flat),
        )


class CosineQuantizer(VectorQuantizer):
    """Features and codebook vectors are compared by direction alone: both have unit length (ViT-VQGAN,
    https://arxiv.org/abs/2110.04627)."""

    def comparable(self, vectors: Tensor, dim: int) -> Tensor:
        return F.normalize(vectors, dim=dim)


class SignQuantizer(nn.Module):
    """A codebook that is computed (look-up free, https://arxiv.org/abs/2310.05737), V = 2^Z: channel j of a vector is 1
    where bit j (of value 2^j) of its code is set, else -1; a feature of 0 is -1 too."""

    def __init__(self, token_size: int) -> None:
        super().__init__()
        self.token_size = token_size

    def nearest(self, features: Tensor) -> Tensor:
        """Codes (B, N) int64 of features (B, N, Z)."""
        return ((features > 0).long() << torch.arange(self.token_size, device=features.device)).sum(dim=-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Signs (B, N, Z) float32 of codes (B, N)."""
        bits = (codes[..., None] >> torch.arange(self.token_size, device=codes.device)) & 1
        return 2.0 * bits - 1.0


def entropy_loss(distances: Tensor) -> Tensor:
    """Mean entropy of the codes' probabilities, minus the entropy of their mean, a scalar in nats: low where each
    feature has one near code and all codes are near to some (MaskGIT's and LlamaGen's tokenizers).

    Args:
        distances: (M, V) squared distances of M features; a code's probability is softmax(-distance / 0.01).
    """
    log_probabilities = F.log_softmax(-distances / ENTROPY_TEMPERATURE, dim=1)
    probabilities = log_probabilities.exp()
    mean = probabilities.mean(dim=0)
    return (mean * (mean + LEAST_PROBABILITY).log()).sum() - (probabilities * log_probabilities).sum(dim=1).mean()
