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

MAX_DISTANCES = 2**28  # at a time: 1 GiB; 1,024 images of 256 codes for V = 1,024, 64 for V = 16,384
ENTROPY_TEMPERATURE = 0.01
EPSILON = 1e-5  # within a logarithm


@dataclass
class QuantizerOutput:
    """Output for training."""

    quantized: Tensor  # (B, Z, h, w) codebook vectors; straight-through gradients to the latents
    codes: Tensor  # (B, N) int64
    codebook_loss: Tensor  # mean squared distance, moves the codebook
    commitment_loss: Tensor  # the same number, moves the encoder
    distances: Callable[[], Tensor]  # computes `VectorQuantizer.distances` (B N, V): up to 1 GiB


class VectorQuantizer(nn.Module):
    """A learned codebook; a latent is quantized to the nearest vector."""

    def __init__(self, codebook_size: int, token_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, token_size)

    def normalize(self, vectors: Tensor, dim: int) -> Tensor:
        """Latents or codebook vectors, with Z at `dim`, before they are compared."""
        return vectors

    def lookup(self, codes: Tensor) -> Tensor:
        """Normalized codebook vectors (B, N, Z) of codes (B, N)."""
        return self.normalize(self.embedding(codes), dim=-1)

    def distances(self, latents: Tensor) -> Tensor:
        """Squared distances (M, V) in float32 of normalized latents (M, Z), minus the latents' squared norms, which are
        the same for all codes."""
        codebook = self.normalize(self.embedding.weight.float(), dim=1)
        with torch.autocast(latents.device.type, enabled=False):
            return torch.addmm(codebook.square().sum(dim=1), latents, codebook.T, alpha=-2)

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes (B, N) int64 of latents (B, N, Z)."""
        flat = self.normalize(latents.flatten(0, 1).float(), dim=1)  # (B N, Z)
        return self._nearest(flat).view(latents.shape[:2])

    @torch.no_grad()
    def _nearest(self, latents: Tensor) -> Tensor:
        """Codes (M,) int64 of normalized latents (M, Z), in chunks to bound the memory of the distances."""
        chunks = latents.split(max(1, MAX_DISTANCES // self.embedding.num_embeddings))
        return torch.cat([self.distances(chunk).argmin(dim=1) for chunk in chunks])

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents (B, Z, h, w) with the straight-through gradient of VQ-VAE."""
        latents = self.normalize(latents.float(), dim=1)
        flat = rearrange(latents, "b z h w -> (b h w) z")
        codes = self._nearest(flat.detach()).view(len(latents), -1)
        vectors = rearrange(self.lookup(codes), "b (h w) z -> b z h w", h=latents.shape[2])
        return QuantizerOutput(
            quantized=latents + (vectors - latents).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(vectors, latents.detach()),
            commitment_loss=F.mse_loss(latents, vectors.detach()),
            distances=partial(self.distances, flat),
        )


class CosineQuantizer(VectorQuantizer):
    """Compares unit vectors (ViT-VQGAN, https://arxiv.org/abs/2110.04627)."""

    def normalize(self, vectors: Tensor, dim: int) -> Tensor:
        return F.normalize(vectors, dim=dim)


class SignQuantizer(nn.Module):
    """Lookup-free quantization (https://arxiv.org/abs/2310.05737), V = 2^Z: channel j of a vector is 1 where bit j (of
    value 2^j) of its code is set, else -1; a latent of 0 counts as -1."""

    def __init__(self, token_size: int) -> None:
        super().__init__()
        self.token_size = token_size

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes (B, N) int64 of latents (B, N, Z)."""
        return ((latents > 0).long() << torch.arange(self.token_size, device=latents.device)).sum(dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Signs (B, N, Z) float32 of codes (B, N)."""
        bits = (codes[..., None] >> torch.arange(self.token_size, device=codes.device)) & 1
        return 2.0 * bits - 1.0


def entropy_loss(distances: Tensor) -> Tensor:
    """Mean entropy of the codes' probabilities minus the entropy of their mean, a scalar in nats: low if each latent is
    near to one code and all codes are used (MaskGIT's and LlamaGen's tokenizers).

    Args:
        distances: (M, V) squared distances of M latents; the probability of a code is softmax(-distance / 0.01).
    """
    log_probabilities = F.log_softmax(-distances / ENTROPY_TEMPERATURE, dim=1)
    probabilities = log_probabilities.exp()
    mean = probabilities.mean(dim=0)
    return (mean * (mean + EPSILON).log()).sum() - (probabilities * log_probabilities).sum(dim=1).mean()
