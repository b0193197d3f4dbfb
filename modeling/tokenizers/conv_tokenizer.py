"""Tokenizers with a convolutional encoder and decoder and a grid of latents.

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
from utils.schema import ConvTokenizerConfig, TokenizerConfig

LIVE_ACTIVATIONS = 6  # at most so many tensors of the size of the widest one are alive at a time


class ConvTokenizer(Tokenizer):
    """A subclass makes encoder, decoder and quantizer, and names the keys that identify it in a state dict.

    Attributes:
        encoder, decoder: without 1x1 convolutions next to the lookup.
        name: for error messages.
        level_key: key of a convolution in the encoder, with fields for level and residual block; it has as many output
            channels as the level.
        mid_key: another key; no other tokenizer has both.
    """

    config_class = ConvTokenizerConfig
    encoder: nn.Module
    decoder: nn.Module
    quantize: VectorQuantizer | SignQuantizer
    name: ClassVar[str]
    level_key: ClassVar[str]
    mid_key: ClassVar[str]

    def __init__(self, config: ConvTokenizerConfig) -> None:
        """
        Raises:
            InputError: sizes that do not fit together.
        """
        factor = 2 ** (len(config.channel_mult) - 1)
        if config.resolution < factor or config.resolution % factor:
            raise InputError(
                f"model.vq_model.resolution={config.resolution}: expected a multiple of {factor} "
                f"({len(config.channel_mult)} levels in channel_mult)"
            )
        super().__init__(config)
        check_first_level(config)
        self._side = config.resolution // factor
        self._widest = config.hidden_channels * max(config.channel_mult[:2])  # at full resolution

    @property
    def code_shape(self) -> tuple[int, int]:
        return self._side, self._side

    @classmethod
    def config_from_state_dict(cls, state: dict[str, Tensor]) -> TokenizerConfig:
        try:
            return cls.config_class(**cls._sizes(state))
        except KeyError as error:
            raise InputError(f"weights without {error}: expected those of a {cls.name} tokenizer") from error

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the config.

        Raises:
            KeyError: a missing entry.
        """
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

    def encode_grid(self, images: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of images (B, 3, H, W) in [0, 1]."""
        return self.encoder(images)

    def decode_grid(self, vectors: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped, of codebook vectors (B, Z, h, w)."""
        return self.decoder(vectors)

    def encode_latents(self, images: Tensor) -> Tensor:
        return rearrange(self.encode_grid(images), "b z h w -> b (h w) z")

    def quantize_latents(self, latents: Tensor) -> Tensor:
        return self.quantize.nearest(latents)

    def codebook_lookup(self, codes: Tensor) -> Tensor:
        return self.quantize.lookup(codes)

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = rearrange(self.codebook_lookup(codes), "b (h w) z -> b z h w", h=self.code_shape[0])
        return self.decode_grid(vectors.to(next(self.decoder.parameters()).dtype))

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
        quantizer_output = self.quantize(self.encode_grid(images))
        return self.decode_grid(quantizer_output.quantized), quantizer_output

    @torch.no_grad()
    def set_vectors(self, codes: Tensor, latents: Tensor) -> None:
        self.quantize.embedding.weight[codes] = latents

    def no_weight_decay(self) -> set[str]:
        return {"quantize.embedding.weight"}
