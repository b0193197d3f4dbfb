"""The convolutional network of taming's VQGAN (https://arxiv.org/abs/2012.09841) and of LlamaGen's tokenizer.

Residual blocks with attention at the lowest resolution, and 1x1 convolutions before and after the lookup. The published
files name the same modules in two ways (`Names`); these names never change.

Legend: B images, C channels, H x W pixels, L levels (each but the last halves the size), h = H / 2^(L-1), w likewise,
Z width of a codebook vector.
"""

from collections import OrderedDict
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modeling.tokenizers.conv_layers import DownsampleConv, UpsampleConv, conv3x3, group_norm
from modeling.tokenizers.conv_tokenizer import CodebookTokenizer
from modeling.tokenizers.vector_quantizer import VectorQuantizer
from utils.schema import VQGANConfig


class Names(NamedTuple):
    """Parts of state-dict keys."""

    down: str  # the encoder's levels
    up: str  # the decoder's levels
    up_ends_at_0: bool  # whether the decoder's levels count down as it runs, so that a number has the encoder's size
    block: str  # the residual blocks of a level
    mid: tuple[str, str, str]  # residual block, attention, residual block


class ResBlock(nn.Module):
    """Pre-norm residual block, (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, bias=True)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, bias=True)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class Attention(nn.Module):
    """Pre-norm self-attention of all positions with one head, (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(conv(y), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(y)


class Level(nn.Module):
    """Residual blocks, each followed by attention at the lowest resolution, then a change of size."""

    def __init__(
        self, widths: list[int], has_attention: bool, block_name: str, resize_name: str, resize: nn.Module
    ) -> None:
        """
        Args:
            widths: before the first block, and after each.
        """
        super().__init__()
        self.block_name, self.resize_name = block_name, resize_name
        self.add_module(block_name, nn.ModuleList(map(ResBlock, widths[:-1], widths[1:])))
        self.attn = nn.ModuleList(Attention(width) if has_attention else nn.Identity() for width in widths[1:])
        self.add_module(resize_name, nn.Sequential(OrderedDict(conv=resize)))

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(getattr(self, self.block_name), self.attn, strict=True):
            x = attention(block(x))
        return getattr(self, self.resize_name)(x)


def mid(channels: int, names: Names) -> nn.Sequential:
    modules = ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels)
    return nn.Sequential(OrderedDict(zip(names.mid, modules, strict=True)))


def encoder(config: VQGANConfig, names: Names) -> nn.Sequential:
    """Images (B, 3, H, W) in [-1, 1] -> (B, z_channels, h, w)."""
    widths = [config.hidden_channels * multiple for multiple in config.channel_mult]
    inputs, last = [config.hidden_channels, *widths], len(widths) - 1
    resizes = [*map(DownsampleConv, widths[:-1]), nn.Identity()]
    blocks = [[inputs[i]] + config.num_res_blocks * [widths[i]] for i in range(len(widths))]
    levels = [Level(blocks[i], i == last, names.block, "downsample", resizes[i]) for i in range(len(widths))]
    modules: dict[str, nn.Module] = {
        "conv_in": conv3x3(3, config.hidden_channels, bias=True),
        names.down: nn.Sequential(*levels),
        "mid": mid(widths[-1], names),
        "norm_out": group_norm(widths[-1]),
        "swish": nn.SiLU(),
        "conv_out": conv3x3(widths[-1], config.z_channels, bias=True),
    }
    return nn.Sequential(OrderedDict(modules))


def decoder(config: VQGANConfig, names: Names) -> nn.Sequential:
    """(B, z_channels, h, w) -> images (B, 3, H, W) in [-1, 1], not clamped. Each level has a block more than the
    encoder's."""
    widths = [config.hidden_channels * multiple for multiple in reversed(config.channel_mult)]
    inputs, last = [widths[0], *widths], len(widths) - 1
    resizes = [*map(UpsampleConv, widths[:-1]), nn.Identity()]
    blocks = [[inputs[i]] + (config.num_res_blocks + 1) * [widths[i]] for i in range(len(widths))]
    levels = [Level(blocks[i], i == 0, names.block, "upsample", resizes[i]) for i in range(len(widths))]
    numbers = [str(last - i if names.up_ends_at_0 else i) for i in range(len(widths))]
    modules: dict[str, nn.Module] = {
        "conv_in": conv3x3(config.z_channels, widths[0], bias=True),
        "mid": mid(widths[0], names),
        names.up: nn.Sequential(OrderedDict(zip(numbers, levels, strict=True))),
        "norm_out": group_norm(widths[-1]),
        "swish": nn.SiLU(),
        "conv_out": conv3x3(widths[-1], 3, bias=True),
    }
    return nn.Sequential(OrderedDict(modules))


class VQGAN(CodebookTokenizer):
    """Images in [0, 1] (the network's range is [-1, 1]) <-> codes in raster order."""

    config_class = VQGANConfig
    names: ClassVar[Names]
    quantizer: ClassVar[type[VectorQuantizer]] = VectorQuantizer

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder = encoder(config, self.names)
        self.decoder = decoder(config, self.names)
        self.quantize = self.quantizer(config.codebook_size, config.token_size)
        self.quant_conv = nn.Conv2d(config.z_channels, config.token_size, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.token_size, config.z_channels, kernel_size=1)

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        return {**super()._sizes(state), "z_channels": len(state["post_quant_conv.weight"])}

    def encode_grid(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(2 * images - 1))

    def decode_grid(self, vectors: Tensor) -> Tensor:
        return (self.decoder(self.post_quant_conv(vectors)) + 1) / 2
