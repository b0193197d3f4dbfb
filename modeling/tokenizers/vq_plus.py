"""VQGAN+ and MaskBit's tokenizer (https://arxiv.org/abs/2409.16211): one network without attention, two quantizers.

`model.vq_model.quantizer_type`: `lookup` has a codebook (published: 4,096 codes of width 64); of `lookup-free` a code's
bits are the signs of the latents' channels, V = 2^Z (published: 10 to 18 bits), and the codebook is computed.

Legend: B images, H x W pixels, L levels (each but the last halves the size), h = H / 2^(L-1), w likewise,
N = h * w codes per image in raster order, V codebook size, Z width of a codebook vector.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from modeling.tokenizers.conv_layers import DownsampleConv, UpsampleConv, conv3x3, group_norm
from modeling.tokenizers.conv_tokenizer import ConvTokenizer
from modeling.tokenizers.maskgit_layers import res_blocks
from modeling.tokenizers.vector_quantizer import SignQuantizer, VectorQuantizer
from utils.errors import InputError
from utils.schema import ConvTokenizerConfig, VQPlusConfig


def level(in_channels: int, out_channels: int, count: int, name: str, resize: nn.Module) -> nn.Sequential:
    """Residual blocks, then a change of size."""
    return nn.Sequential(OrderedDict({"res_blocks": res_blocks(in_channels, out_channels, count), name: resize}))


def encoder(config: ConvTokenizerConfig) -> nn.Sequential:
    """Images (B, 3, H, W) in [0, 1] -> latents (B, Z, h, w)."""
    widths, count = [config.hidden_channels * multiple for multiple in config.channel_mult], config.num_res_blocks
    inputs, resizes = [config.hidden_channels, *widths], [*map(DownsampleConv, widths[:-1]), nn.Identity()]
    down = [level(inputs[i], widths[i], count, "down_conv", resizes[i]) for i in range(len(widths))]
    modules: dict[str, nn.Module] = {
        "conv_in": conv3x3(3, config.hidden_channels, bias=False),
        "down": nn.Sequential(*down),
        "mid": level(widths[-1], widths[-1], count, "resize", nn.Identity()),
        "norm_out": group_norm(widths[-1]),
        "swish": nn.SiLU(),
        "conv_out": nn.Conv2d(widths[-1], config.token_size, kernel_size=1),
    }
    return nn.Sequential(OrderedDict(modules))


def decoder(config: ConvTokenizerConfig) -> nn.Sequential:
    """Codebook vectors (B, Z, h, w) -> images (B, 3, H, W), not clamped. up[0] has the lowest resolution."""
    widths = [config.hidden_channels * multiple for multiple in reversed(config.channel_mult)]
    inputs, resizes = [widths[0], *widths], [*map(UpsampleConv, widths[:-1]), nn.Identity()]
    up = [level(inputs[i], widths[i], config.num_res_blocks, "upsample_conv", resizes[i]) for i in range(len(widths))]
    modules: dict[str, nn.Module] = {
        "conv_in": conv3x3(config.token_size, widths[0], bias=True),
        "mid": level(widths[0], widths[0], config.num_res_blocks, "resize", nn.Identity()),
        "up": nn.Sequential(*up),
        "norm_out": group_norm(widths[-1]),
        "swish": nn.SiLU(),
        "conv_out": conv3x3(widths[-1], 3, bias=True),
    }
    return nn.Sequential(OrderedDict(modules))


class VQPlus(ConvTokenizer):
    """Images in [0, 1] <-> codes in raster order."""

    config_class = VQPlusConfig
    name = "VQGAN+ or MaskBit"
    level_key = "encoder.down.{}.res_blocks.{}.conv2.weight"
    mid_key = "encoder.mid.res_blocks.0.norm1.weight"

    def __init__(self, config: VQPlusConfig) -> None:
        super().__init__(config)
        self.encoder = encoder(config)
        self.decoder = decoder(config)
        if config.quantizer_type == "lookup":
            self.quantize = VectorQuantizer(config.codebook_size, config.token_size)
            return
        if config.codebook_size != 2**config.token_size:
            raise InputError(
                f"model.vq_model.codebook_size={config.codebook_size}: expected 2^token_size={2**config.token_size} "
                "with quantizer_type=lookup-free"
            )
        self.quantize = SignQuantizer(config.token_size)

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        if "quantize.embedding.weight" in state:
            return super()._sizes(state)
        bits = len(state["encoder.conv_out.bias"])
        own = {"codebook_size": 2**bits, "token_size": bits, "quantizer_type": "lookup-free"}
        return {**own, **cls._network_sizes(state)}

    @classmethod
    def weights_of(cls, state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
        for key, is_right in COMPUTED.items():
            if key in state and not is_right(state[key]):
                raise InputError(
                    f"{source}: {key}: found other values than expected where signs are the bits of a code"
                )
        return {key: value for key, value in state.items() if key not in COMPUTED}


def _are_bits(values: Tensor) -> bool:
    return torch.equal(values.double(), 2.0 ** torch.arange(values.numel(), dtype=torch.float64))


def _are_all_vectors(vectors: Tensor) -> bool:
    if vectors.ndim != 2:
        return False
    count, bits = vectors.shape
    return count == 2**bits and torch.equal(vectors.float(), SignQuantizer(bits).lookup(torch.arange(count)))


# Entries of published lookup-free files besides the weights, with their checks.
COMPUTED = {"quantize.bits_to_indices": _are_bits, "quantize.codebook": _are_all_vectors}
