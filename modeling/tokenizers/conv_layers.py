"""Layers of the convolutional tokenizers, and a faster form of their decoders.

Legend: B images, C channels, H x W pixels.
"""

import copy
import math

import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError
from utils.schema import ConvTokenizerConfig

MAX_GROUPS, MIN_GROUP_WIDTH = 32, 4  # of the group norms


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, as published (narrowest level: 128 channels); fewer in narrow levels, where a group needs four
    channels."""
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels // MIN_GROUP_WIDTH), channels, eps=1e-6)


def check_first_level(config: ConvTokenizerConfig) -> None:
    """
    Raises:
        InputError: the channels do not divide into groups.
    """
    if config.hidden_channels % MIN_GROUP_WIDTH:
        raise InputError(
            f"model.vq_model.hidden_channels={config.hidden_channels}: expected a multiple of {MIN_GROUP_WIDTH}"
        )


def conv3x3(in_channels: int, out_channels: int, bias: bool) -> nn.Conv2d:
    # TF's "SAME" is one pixel on each side at stride 1.
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)


class DownsampleConv(nn.Conv2d):
    """Half the size, (B, C, H, W) -> (B, C, H / 2, W / 2): a 3x3 convolution of stride 2, padded right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class UpsampleConv(nn.Conv2d):
    """Twice the size, (B, C, H, W) -> (B, C, 2 H, 2 W): nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def fold_upsampling(decoder: nn.Module) -> nn.Module:
    """A copy for decoding in which nearest x2 and the 3x3 convolution after it are one operation.

    A 3x3 convolution of doubled pixels is a transposed 4x4 convolution of stride 2: the same function with 4/9 of the
    multiplications. The copy's state dict has other shapes; do not save it.
    """
    decoder = copy.deepcopy(decoder)
    for parent in list(decoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, UpsampleConv):
                setattr(parent, name, _folded(child))
    return decoder


def _folded(upsample_conv: UpsampleConv) -> nn.ConvTranspose2d:
    weight, bias = upsample_conv.weight, upsample_conv.bias  # (out, in, 3, 3)
    assert bias is not None
    folded = weight.new_zeros(*weight.shape[:2], 4, 4)
    for row in (0, 1):
        for column in (0, 1):  # the four copies of a pixel
            folded[:, :, row : row + 3, column : column + 3] += weight.detach()
    transposed = nn.ConvTranspose2d(weight.shape[1], weight.shape[0], kernel_size=4, stride=2, padding=1)
    transposed.weight = nn.Parameter(folded.flip(2, 3).transpose(0, 1).contiguous(), requires_grad=False)
    transposed.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return transposed
