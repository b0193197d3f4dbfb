"""The MaskGIT-VQ tokenizer: a convolutional VQGAN without attention, images to codes and back.

The defaults of `VQModelConfig` are the published f16 model (MaskGIT, https://arxiv.org/abs/2202.04200, in the PyTorch
port that RAR uses, `maskgit-vqgan-imagenet-f16-256.bin`); its state-dict keys are those of that file and never change.

Legend: B images, H x W pixels, L levels (each but the last halves the size), h = H / 2^(L-1), w likewise,
N = h * w codes per image in raster order, V codebook size, Z width of a codebook vector.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from utils.errors import InputError
from utils.files.hub import local_file
from utils.files.weights import load_state_dict, load_strict
from utils.schema import Config, VQModelConfig

MAX_GROUPS, MIN_GROUP_WIDTH = 32, 4  # of the group norms


@dataclass
class QuantizerOutput:
    """What training needs of the quantizer."""

    quantized: Tensor  # (B, Z, h, w) codebook vectors; gradients pass straight through to the features
    codes: Tensor  # (B, N) int64
    codebook_loss: Tensor  # mean squared distance, moves the codebook
    commitment_loss: Tensor  # the same number, moves the encoder


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as published (narrowest level: 128 channels); fewer in narrow levels, where a group would otherwise
    hold under four channels and the norm would erase what each of them carries."""
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels // MIN_GROUP_WIDTH), channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int, bias: bool) -> nn.Conv2d:
    # TF's "SAME" is one pixel on each side at stride 1.
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)


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
        self.nin_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, kernel_size=1, bias=False)
        self.changes_width = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(y if self.changes_width else x)


def res_blocks(in_channels: int, out_channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(count)])


class DownLevel(nn.Module):
    """Residual blocks, then 2x2 average pooling except in the last level."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, downsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(in_channels, out_channels, num_res_blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return F.avg_pool2d(x, kernel_size=2) if self.downsample else x


class UpLevel(nn.Module):
    """Residual blocks, then nearest x2 and a convolution except in the first level (which runs last)."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, upsample: bool) -> None:
        super().__init__()
        self.block = res_blocks(in_channels, out_channels, num_res_blocks)
        self.upsample_conv = conv3x3(out_channels, out_channels, bias=True) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        if isinstance(self.upsample_conv, nn.ConvTranspose2d):  # put there by `fold_upsampling`
            return self.upsample_conv(x)
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> features (B, Z, h, w)."""

    def __init__(self, config: VQModelConfig) -> None:
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

    def __init__(self, config: VQModelConfig) -> None:
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


def fold_upsampling(decoder: Decoder) -> Decoder:
    """A copy for decoding only, in which nearest x2 and the 3x3 convolution after it are one operation.

    A 3x3 convolution of doubled pixels is a transposed 4x4 convolution of stride 2 (in other words, four 2x2
    convolutions whose results interleave): the same function with 4/9 of the products. The copy has other state-dict
    keys' shapes and is not meant to be saved.
    """
    decoder = copy.deepcopy(decoder)
    for level in decoder.up:
        if level.upsample_conv is None:
            continue
        weight = level.upsample_conv.weight  # (out, in, 3, 3)
        folded = weight.new_zeros(*weight.shape[:2], 4, 4)
        for row in (0, 1):
            for column in (0, 1):  # the four copies of a pixel
                folded[:, :, row : row + 3, column : column + 3] += weight.detach()
        transposed = nn.ConvTranspose2d(*weight.shape[1::-1], kernel_size=4, stride=2, padding=1)
        transposed.weight = nn.Parameter(folded.flip(2, 3).transpose(0, 1).contiguous(), requires_grad=False)
        transposed.bias = nn.Parameter(level.upsample_conv.bias.detach().clone(), requires_grad=False)
        level.upsample_conv = transposed
    return decoder


class VectorQuantizer(nn.Module):
    """The codebook; a feature goes to the nearest of its vectors."""

    def __init__(self, codebook_size: int, token_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, token_size)

    def nearest(self, features: Tensor) -> Tensor:
        """Codes (B, N) int64 of features (B, Z, h, w), by squared distance in float32."""
        flat = rearrange(features, "b z h w -> (b h w) z").float()
        codebook = self.embedding.weight.float()
        with torch.autocast(flat.device.type, enabled=False):
            # The features' own squared norm is the same for all codes and left out.
            distances = torch.addmm(codebook.square().sum(dim=1), flat, codebook.T, alpha=-2)  # (B N, V)
        return rearrange(distances.argmin(dim=1), "(b n) -> b n", b=features.shape[0])

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantize features (B, Z, h, w) with the straight-through gradient of VQ-VAE (arXiv 1711.00937)."""
        codes = self.nearest(features)
        vectors = rearrange(self.embedding(codes), "b (h w) z -> b z h w", h=features.shape[2])
        features = features.float()
        return QuantizerOutput(
            quantized=features + (vectors - features).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(vectors, features.detach()),
            commitment_loss=F.mse_loss(features, vectors.detach()),
        )


class MaskGitVQ(nn.Module):
    """Images in [0, 1] without further normalization <-> codes in raster order."""

    def __init__(self, config: VQModelConfig) -> None:
        """
        Raises:
            InputError: sizes that do not fit together.
        """
        super().__init__()
        factor = 2 ** (len(config.channel_mult) - 1)
        if config.hidden_channels % MIN_GROUP_WIDTH:
            raise InputError(
                f"model.vq_model.hidden_channels={config.hidden_channels}: expected a multiple of {MIN_GROUP_WIDTH}"
            )
        if config.resolution % factor:
            raise InputError(
                f"model.vq_model.resolution={config.resolution}: expected a multiple of {factor} "
                f"({len(config.channel_mult)} levels in channel_mult)"
            )
        self.resolution, self.grid_size = config.resolution, config.resolution // factor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.token_size)

    @property
    def codebook_size(self) -> int:
        return self.quantize.embedding.num_embeddings

    @property
    def codebook_dim(self) -> int:
        return self.quantize.embedding.embedding_dim

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2

    def no_weight_decay(self) -> set[str]:
        """Parameters that decay would harm: the codebook (norms and biases are one-dimensional and never decay)."""
        return {"quantize.embedding.weight"}

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, N) int64 of images (B, 3, H, W) in [0, 1], H = W = resolution.

        Raises:
            ValueError: another image shape.
        """
        if images.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (B, 3, {self.resolution}, {self.resolution})"
            )
        return self.quantize.nearest(self.encoder(images))

    def embed(self, codes: Tensor) -> Tensor:
        """Codebook vectors (B, N, Z) of codes (B, N)."""
        return self.quantize.embedding(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W), clamped to [0, 1], of codes (B, N)."""
        return self.decode_unclamped(codes).clamp(0.0, 1.0)

    def decode_unclamped(self, codes: Tensor) -> Tensor:
        """The decoder's raw output (B, 3, H, W) for codes (B, N).

        Raises:
            ValueError: another number of codes per image.
        """
        if codes.shape[1:] != (self.image_seq_len,):
            raise ValueError(f"codes of shape {tuple(codes.shape)}: expected (B, {self.image_seq_len})")
        return self.decoder(rearrange(self.embed(codes), "b (h w) z -> b z h w", h=self.grid_size))

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """For training: unclamped reconstructions (B, 3, H, W) of images (B, 3, H, W) and the quantizer's losses."""
        quantizer_output = self.quantize(self.encoder(images))
        return self.decoder(quantizer_output.quantized), quantizer_output


def tokenizer_sizes(state: dict[str, Tensor]) -> VQModelConfig:
    """Sizes of the tokenizer with this state dict; `resolution` and `num_latent_tokens` are not in it and stay default.

    Raises:
        InputError: keys of another model.
    """
    try:
        codebook_size, token_size = state["quantize.embedding.weight"].shape
        hidden_channels = len(state["encoder.conv_in.weight"])
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
        widths = [len(state[f"encoder.down.{level}.block.0.conv2.weight"]) for level in range(levels)]
        num_res_blocks = sum(key.startswith("encoder.mid.") and key.endswith(".conv1.weight") for key in state)
    except (KeyError, ValueError) as error:
        raise InputError(f"weights without {error}: expected those of a MaskGIT-VQ tokenizer") from error
    return VQModelConfig(
        codebook_size=codebook_size,
        token_size=token_size,
        hidden_channels=hidden_channels,
        channel_mult=[width // hidden_channels for width in widths],
        num_res_blocks=num_res_blocks,
    )


def load_tokenizer(config: Config) -> MaskGitVQ:
    """The frozen tokenizer of `experiment.tokenizer_checkpoint` in eval mode, float32 (also from fp16 files), on CPU.

    Raises:
        InputError: the file is missing, damaged or refused, or its keys or shapes differ from `model.vq_model`.
    """
    path = local_file(config.experiment.tokenizer_checkpoint)
    state = load_state_dict(path)
    tokenizer = MaskGitVQ(config.model.vq_model)
    load_strict(tokenizer, state, path)
    return tokenizer.eval().requires_grad_(False)
