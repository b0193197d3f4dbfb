"""Encoder and decoder of the TiTok tokenizer: transformers over the patches of an image and a few latent tokens.

The modules' names are the keys of the published weights and never change (modeling/tokenizers/titok.py).

Legend: B images, H x W pixels, g x g patches, P = g^2, N latent tokens, D width, Z width of a codebook vector.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    width: int  # D
    layers: int
    heads: int


SIZES = {"tiny": Size(32, 2, 2), "small": Size(512, 8, 8), "base": Size(768, 12, 12), "large": Size(1024, 24, 16)}


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, D) -> (B, T, D)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(size.width)
        self.attn = nn.MultiheadAttention(size.width, size.heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(size.width)
        layers = OrderedDict(
            c_fc=nn.Linear(size.width, 4 * size.width), gelu=nn.GELU(), c_proj=nn.Linear(4 * size.width, size.width)
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A class token, the patches and the latent tokens in one sequence, with learned position embeddings."""

    def __init__(self, size: Size, num_patches: int, num_latent_tokens: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.class_embedding = _random_vectors(1, size)
        self.positional_embedding = _random_vectors(1 + num_patches, size)
        self.latent_token_positional_embedding = _random_vectors(num_latent_tokens, size)
        self.ln_pre = nn.LayerNorm(size.width)
        self.transformer = nn.ModuleList([Block(size) for _ in range(size.layers)])
        self.ln_post = nn.LayerNorm(size.width)

    def run(self, patches: Tensor, latent_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Output for patches (B, P, D) and latent tokens (B, N, D)."""
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        image = torch.cat([class_token, patches], dim=1) + self.positional_embedding
        x = torch.cat([image, latent_tokens + self.latent_token_positional_embedding], dim=1)  # (B, 1 + P + N, D)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        return x[:, 1 : 1 + self.num_patches], x[:, 1 + self.num_patches :]


class TiTokEncoder(Transformer):
    """Images (B, 3, H, W) in [0, 1] and initial latent tokens (N, D) -> latents (B, N, Z).

    Quirk of the legacy weights: the latent tokens (B, N, D) are not transposed but reshaped to (B, D, N), so that a
    latent mixes several of them.
    """

    def __init__(
        self, size: Size, grid: int, patch_size: int, num_latent_tokens: int, token_size: int, is_legacy: bool
    ) -> None:
        super().__init__(size, grid**2, num_latent_tokens)
        self.is_legacy = is_legacy
        self.patch_embed = nn.Conv2d(3, size.width, kernel_size=patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(size.width, token_size, kernel_size=1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        patches = rearrange(self.patch_embed(images), "b d h w -> b (h w) d")
        _, x = self.run(patches, latent_tokens.expand(len(images), -1, -1))
        x = self.ln_post(x)  # (B, N, D)
        x = x.reshape(len(x), x.shape[2], x.shape[1]) if self.is_legacy else x.mT  # (B, D, N)
        return rearrange(self.conv_out(x[..., None]), "b z n 1 -> b n z")


class TiTokDecoder(Transformer):
    """Codebook vectors (B, N, Z) -> unclamped pixels (B, 3, H, W); legacy: logits (B, K, g, g) over K pixel codes."""

    def __init__(
        self, size: Size, grid: int, patch_size: int, num_latent_tokens: int, token_size: int, pixel_codes: int | None
    ) -> None:
        super().__init__(size, grid**2, num_latent_tokens)
        self.grid = grid
        self.mask_token = nn.Parameter(_random_vectors(1, size)[None])
        self.decoder_embed = nn.Linear(token_size, size.width)
        if pixel_codes is not None:
            wide = 2 * size.width
            self.ffn = nn.Sequential(nn.Conv2d(size.width, wide, 1), nn.Tanh(), nn.Conv2d(wide, pixel_codes, 1))
            self.conv_out: nn.Module = nn.Identity()
        else:
            to_pixels = Rearrange("b (p q c) h w -> b c (h p) (w q)", p=patch_size, q=patch_size)
            self.ffn = nn.Sequential(nn.Conv2d(size.width, 3 * patch_size**2, 1), to_pixels)
            self.conv_out = nn.Conv2d(3, 3, kernel_size=3, padding=1)

    def forward(self, vectors: Tensor) -> Tensor:
        patches = self.mask_token.expand(len(vectors), self.num_patches, -1)
        x, _ = self.run(patches, self.decoder_embed(vectors))
        x = rearrange(self.ln_post(x), "b (h w) d -> b d h w", h=self.grid)
        return self.conv_out(self.ffn(x))


def _random_vectors(count: int, size: Size) -> nn.Parameter:
    return nn.Parameter(size.width**-0.5 * torch.randn(count, size.width))
