"""A small tokenizer that learns quickly on a CPU: linear patches, residual blocks on the grid of tokens, a codebook.

As in ViT-VQGAN (https://arxiv.org/abs/2110.04627), nothing runs at full resolution; convolutions take the place of
attention. `init_from_images` makes it the principal components of the training patches, and each residual block starts
as the identity. With a codebook from k-means, training therefore starts where k-means of raw patches ends.

Legend: B images, H x W pixels, p = 2^(levels - 1) edge of a patch, h = H / p, w = W / p, D width of the blocks,
N = h * w codes per image in raster order, V codebook size, Z width of a codebook vector.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.tokenizers.conv_layers import conv3x3, group_norm
from modeling.tokenizers.conv_tokenizer import LIVE_ACTIVATIONS, CodebookTokenizer
from modeling.tokenizers.vector_quantizer import VectorQuantizer
from utils.errors import InputError
from utils.schema import ConvTokenizerConfig

FREE_CHANNEL_SCALE = 0.3  # of the decoder's first convolution, for channels beyond the principal components


class PatchBlock(nn.Module):
    """Pre-norm residual block, (B, D, h, w) -> (B, D, h, w); the identity before training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.conv1 = conv3x3(channels, channels, bias=True)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class PatchEncoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> latents (B, Z, h, w)."""

    def __init__(self, config: ConvTokenizerConfig, patch_size: int) -> None:
        super().__init__()
        width = config.hidden_channels
        self.conv_in = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.blocks = nn.Sequential(*(PatchBlock(width) for _ in range(config.num_res_blocks)))
        self.conv_out = nn.Conv2d(width, config.token_size, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.blocks(self.conv_in(x)))


class PatchDecoder(nn.Module):
    """Codebook vectors (B, Z, h, w) -> images (B, 3, H, W), not clamped; one block more than the encoder."""

    def __init__(self, config: ConvTokenizerConfig, patch_size: int) -> None:
        super().__init__()
        width = config.hidden_channels
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(config.token_size, width, kernel_size=1)
        self.blocks = nn.Sequential(*(PatchBlock(width) for _ in range(config.num_res_blocks + 1)))
        self.conv_out = nn.Conv2d(width, 3 * patch_size**2, kernel_size=1)

    def forward(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv_out(self.blocks(self.conv_in(z))), self.patch_size)


class PatchVQ(CodebookTokenizer):
    """Images in [0, 1] <-> codes of patches.

    Raises InputError for sizes that do not fit together.
    """

    name = "patch"
    level_key = mid_key = "encoder.blocks.0.conv2.weight"
    quantize: VectorQuantizer
    encoder: PatchEncoder
    decoder: PatchDecoder

    def __init__(self, config: ConvTokenizerConfig) -> None:
        super().__init__(config)
        if set(config.channel_mult) != {1}:
            raise InputError(
                f"model.vq_model.channel_mult={config.channel_mult}: expected a 1 for each level of patch_vq, whose "
                "blocks all have hidden_channels"
            )
        self._patch_size = 2 ** (len(config.channel_mult) - 1)
        self._width = config.hidden_channels
        self.encoder = PatchEncoder(config, self._patch_size)
        self.decoder = PatchDecoder(config, self._patch_size)
        self.quantize = VectorQuantizer(config.codebook_size, config.token_size)

    @classmethod
    def _network_sizes(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        hidden_channels, _, patch_size, _ = state["encoder.conv_in.weight"].shape
        blocks = [f"encoder.blocks.{block}.conv2.weight" for block in range(len(state))]
        if blocks[0] not in state:
            raise KeyError(blocks[0])
        return {
            "hidden_channels": hidden_channels,
            "channel_mult": [1] * patch_size.bit_length(),
            "num_res_blocks": sum(key in state for key in blocks),
        }

    @property
    def decoder_activations(self) -> int:
        grid = self.code_shape[0] * self.code_shape[1]
        return LIVE_ACTIVATIONS * grid * max(self._width, 3 * self._patch_size**2)

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        """Encode the first principal components of the patches of images (B, 3, H, W) in [0, 1], and decode them."""
        encoder, decoder = self.encoder, self.decoder
        size = self._patch_size
        patches = F.unfold(images, kernel_size=size, stride=size).mT.flatten(0, 1).double()  # (B N, 3 p^2)
        mean = patches.mean(dim=0)
        components = torch.linalg.eigh((patches - mean).T @ (patches - mean)).eigenvectors.flip(1).T
        components = components[: min(self.codebook_dim, encoder.conv_in.out_channels)]  # (K, 3 p^2)
        count = len(components)

        encoder.conv_in.weight[:count] = components.view(count, 3, size, size).float()
        encoder.conv_in.bias[:count] = (-components @ mean).float()  # type: ignore[index]
        encoder.conv_out.weight.zero_()
        _select(encoder.conv_out, count)
        decoder.conv_in.weight.mul_(FREE_CHANNEL_SCALE)
        _select(decoder.conv_in, count)
        decoder.conv_out.weight.zero_()
        decoder.conv_out.weight[:, :count, 0, 0] = components.T.float()
        decoder.conv_out.bias.copy_(mean)  # type: ignore[union-attr]


def _select(conv: nn.Conv2d, count: int) -> None:
    """Make the first `count` outputs of a 1x1 convolution its first `count` inputs."""
    conv.weight[:count] = 0
    conv.weight[range(count), range(count)] = 1
    assert conv.bias is not None
    conv.bias.zero_()
