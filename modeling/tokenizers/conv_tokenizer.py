"""Tokenizers with a convolutional encoder and decoder, between which there is a grid of vectors.

Legend: B images, H x W pixels, L levels (each but the last halves the size), h = H / 2^(L-1), w likewise,
N = h * w codes per image in raster order, V codebook size, Z width of a codebook vector.
"""

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from modeling.tokenizers.conv_layers import check_first_level, fold_upsampling
from modeling.tokenizers.tokenizer import PlainDecoder, Tokenizer, TrainableTokenizer
from modeling.tokenizers.vector_quantizer import QuantizerOutput, SignQuantizer, VectorQuantizer
from utils.errors import InputError
from utils.schema import VQModelConfig

LIVE_ACTIVATIONS = 6  # tensors of the size of the widest full-resolution one that exist at a time, at most


class ConvTokenizer(Tokenizer):
    """A subclass makes the three networks below and says how they are known in a state dict.

    Attributes:
        encoder, decoder: the networks, without 1x1 convolutions beside the look-up.
        name: in error messages.
        level_key: of a convolution in the encoder's level i and residual block j, with places for both; the
            convolution has the level's width.
        mid_key: another key; no other tokenizer has both.
    """

    encoder: nn.Module
    decoder: nn.Module
    quantize: VectorQuantizer | SignQuantizer
    name: ClassVar[str]
    level_key: ClassVar[str]
    mid_key: ClassVar[str]

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__(config)
        check_first_level(config)
        self._widest = config.hidden_channels * max(config.channel_mult[:2])  # at full resolution

    @classmethod
    def code_shape_of(cls, config: VQModelConfig) -> tuple[int, int]:
        factor = 2 ** (len(config.channel_mult) - 1)
        if config.resolution < factor or config.resolution % factor:
            raise InputError(
                f"model.vq_model.resolution={config.resolution}: expected a multiple of {factor} "
                f"({len(config.channel_mult)} levels in channel_mult)"
            )
        return config.resolution // factor, config.resolution // factor

    @classmethod
    def sizes_of(cls, state: dict[str, Tensor]) -> VQModelConfig:
        try:
            return VQModelConfig(**cls._sizes(state))
        except KeyError as error:
            raise InputError(f"weights without {error}: expected those of a {cls.name} tokenizer") from error

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the config; a KeyError names what is missing."""
        codebook_size, token_size = state["quantize.embedding.weight"].shape
        return {"codebook_size": codebook_size, "token_size": token_size, **cls._network_sizes(state)}

    @classmethod
    def _network_sizes(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        for key in (cls.mid_key, cls.level_key.format(0, 0)):
            if key not in state:
                raise KeyError(key)
        levels = [cls.level_key.format(level, 0) for level in range(len(state))]
        blocks = [cls.level_key.format(0, block) for block in range(len(state))]
        hidden_channels = len(state["encoder.conv_in.weight"])
        return {
            "hidden_channels": hidden_channels,
            "channel_mult": [len(state[key]) // hidden_channels for key in levels if key in state],
            "num_res_blocks": sum(key in state for key in blocks),
        }

    @property
    def decoder_activations(self) -> int:
        return LIVE_ACTIVATIONS * self._widest * self.resolution**2

    def feature_grid(self, images: Tensor) -> Tensor:
        """Features (B, Z, h, w) of images (B, 3, H, W) in [0, 1]."""
        return self.encoder(images)

    def images_of(self, vectors: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped, of codebook vectors (B, Z, h, w)."""
        return self.decoder(vectors)

    def encode_latents(self, images: Tensor) -> Tensor:
        return rearrange(self.feature_grid(images), "b z h w -> b (h w) z")

    def quantize_latents(self, features: Tensor) -> Tensor:
        return self.quantize.nearest(features)

    def codebook_lookup(self, codes: Tensor) -> Tensor:
        return self.quantize.vectors(codes)

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = rearrange(self.codebook_lookup(codes), "b (h w) z -> b z h w", h=self.code_shape[0])
        return self.images_of(vectors.to(next(self.decoder.parameters()).dtype))

    def fast_decoder(self) -> nn.Module:
        return FoldedDecoder(self)


class FoldedDecoder(PlainDecoder):
    """With folded upsampling, and without the encoder."""

    def __init__(self, tokenizer: ConvTokenizer) -> None:
        super().__init__(tokenizer)
        self.tokenizer.encoder = nn.Identity()
        self.tokenizer.decoder = fold_upsampling(tokenizer.decoder)


class CodebookTokenizer(ConvTokenizer, TrainableTokenizer):
    """A convolutional tokenizer whose codebook is learned."""

    quantize: VectorQuantizer

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        quantizer_output = self.quantize(self.feature_grid(images))
        return self.images_of(quantizer_output.quantized), quantizer_output

    @torch.no_grad()
    def set_vectors(self, codes: Tensor, features: Tensor) -> None:
        self.quantize.embedding.weight[codes] = features

    def no_weight_decay(self) -> set[str]:
        return {"quantize.embedding.weight"}
