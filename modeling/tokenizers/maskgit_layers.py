"""Encoder and decoder of the MaskGIT-VQ tokenizer: convolutions and group norms, no attention.

The modules' names are the keys of the published weights and never change (modeling/tokenizers/maskgit_vq.py).

Legend: B images, H x W pixels, L levels (each but the last halves the size), h = H / 2^(L-1), w likewise,
Z width of a codebook vector.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from modeling.tokenizers.conv_layers import UpsampleConv, conv3x3, group_norm
from utils.schema import ConvTokenizerConfig


class ResBlock(nn.Module):
    """Pre-norm residual block, (B, in, H, W) -> (B, out, H, W).

    Quirk of the published weights: where the width changes, the 1x1 shortcut reads the output of the second
    convolution, not the block's input, so that such a block is not residual at all.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, bias=False)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, kernel_size=1, bias=False)
        self.changes_width = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(y if self.changes_width else x)


def res_blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(count)))


class DownLevel(nn.Module):
    """Residual blocks, then 2x2 average pooling except in the last level."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, downsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(in_channels, out_channels, num_res_blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return F.avg_pool2d(x, kernel_size=2) if self.downsample else x


class UpLevel(nn.Module):
    """Residual blocks, then nearest x2 and a convolution except in the first level (which runs last)."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, upsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(in_channels, out_channels, num_res_blocks)
        self.upsample_conv = UpsampleConv(out_channels) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x if self.upsample_conv is None else self.upsample_conv(x)


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> latents (B, Z, h, w)."""

    def __init__(self, config: ConvTokenizerConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * multiple for multiple in config.channel_mult]
        inputs, last = [config.hidden_channels] + widths[:-1], len(widths) - 1
        self.conv_in = conv3x3(3, config.hidden_channels, bias=False)
        self.down = nn.ModuleList(
            [DownLevel(inputs[i], widths[i], config.num_res_blocks, downsample=i < last) for i in range(len(widths))]
        )
        self.mid = res_blocks(widths[-1], widths[-1], config.num_res_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.token_size, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in [*self.down, *self.mid]:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Codebook vectors (B, Z, h, w) -> images (B, 3, H, W), not clamped."""

    def __init__(self, config: ConvTokenizerConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * multiple for multiple in config.channel_mult]
        inputs = widths[1:] + widths[-1:]
        self.conv_in = conv3x3(config.token_size, widths[-1], bias=True)
        self.mid = res_blocks(widths[-1], widths[-1], config.num_res_blocks)
        self.up = nn.ModuleList(  # up[i] belongs to down[i]: the list runs backwards
            [UpLevel(inputs[i], widths[i], config.num_res_blocks, upsample=i > 0) for i in range(len(widths))]
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for level in [*self.mid, *reversed(self.up)]:
            z = level(z)
        return self.conv_out(F.silu(self.norm_out(z)))
