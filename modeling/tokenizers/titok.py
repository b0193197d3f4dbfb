"""The TiTok tokenizer (https://arxiv.org/abs/2406.07550): an image as a few codes without a grid.

The legacy models (L-32, B-64, S-128) decode to the codes of a MaskGIT-VQ, whose decoder makes the pixels; the later
ones (BL-64, BL-128, SL-256, with 8,192 codes) decode to pixels. State-dict keys are the keys in the published
safetensors files (https://github.com/bytedance/1d-tokenizer) and never change.

Legend: B images, H = W pixels, g x g patches, N codes per image, V codebook size, Z width of a codebook vector, K codes
of the MaskGIT-VQ.
"""

from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from modeling.tokenizers.conv_layers import check_first_level, fold_upsampling
from modeling.tokenizers.conv_tokenizer import LIVE_ACTIVATIONS
from modeling.tokenizers.maskgit_layers import Decoder
from modeling.tokenizers.titok_layers import SIZES, TiTokDecoder, TiTokEncoder
from modeling.tokenizers.tokenizer import PlainDecoder, Tokenizer
from modeling.tokenizers.vector_quantizer import CosineQuantizer, VectorQuantizer
from utils.errors import InputError
from utils.schema import TiTokConfig

PIXEL_CODEBOOK = (1024, 256)  # codes of the MaskGIT-VQ behind a legacy model, and their width
PREFIX = "pixel_decoder"
PATCH_SIZES = ("vit_enc_patch_size", "vit_dec_patch_size")


class TiTokVQ(Tokenizer):
    """Images in [0, 1] <-> codes without a grid; `hidden_channels`, `channel_mult` and `num_res_blocks` of the config
    describe the MaskGIT-VQ decoder of a legacy model."""

    config_class = TiTokConfig

    def __init__(self, config: TiTokConfig) -> None:
        """Raises InputError for sizes that do not fit together."""
        check_sizes(config)
        super().__init__(config)
        self.is_legacy = config.is_legacy
        self._channels = config.hidden_channels * max(config.channel_mult[:2]) if config.is_legacy else 3  # of pixels
        encoder, decoder = SIZES[config.vit_enc_model_size], SIZES[config.vit_dec_model_size]
        self.latent_tokens = nn.Parameter(encoder.width**-0.5 * torch.randn(self.image_seq_len, encoder.width))
        self.encoder = TiTokEncoder(
            encoder,
            grid=self.resolution // config.vit_enc_patch_size,
            patch_size=config.vit_enc_patch_size,
            num_latent_tokens=self.image_seq_len,
            token_size=self.codebook_dim,
            is_legacy=self.is_legacy,
        )
        self.decoder = TiTokDecoder(
            decoder,
            grid=self.resolution // config.vit_dec_patch_size,
            patch_size=config.vit_dec_patch_size,
            num_latent_tokens=self.image_seq_len,
            token_size=self.codebook_dim,
            pixel_codes=PIXEL_CODEBOOK[0] if self.is_legacy else None,
        )
        self._use_l2_norm = config.use_l2_norm
        quantizer = CosineQuantizer if config.use_l2_norm else VectorQuantizer
        self.quantize = quantizer(config.codebook_size, config.token_size)
        if self.is_legacy:
            check_first_level(config)
            self.pixel_quantize = VectorQuantizer(*PIXEL_CODEBOOK)
            self.pixel_decoder = Decoder(replace(config, token_size=PIXEL_CODEBOOK[1]))

    @classmethod
    def config_from_state_dict(cls, state: dict[str, Tensor]) -> TiTokConfig:
        try:
            codebook_size, token_size = state["quantize.embedding.weight"].shape
            encoder_patch = state["encoder.patch_embed.weight"].shape[2]
            config = TiTokConfig(
                codebook_size=codebook_size,
                token_size=token_size,
                num_latent_tokens=len(state["latent_tokens"]),
                resolution=isqrt(len(state["encoder.positional_embedding"]) - 1) * encoder_patch,
                is_legacy="pixel_quantize.embedding.weight" in state,
                vit_enc_model_size=_model_size(state, "encoder"),
                vit_dec_model_size=_model_size(state, "decoder"),
                vit_enc_patch_size=encoder_patch,
            )
            config.use_l2_norm = config.is_legacy  # as in all published models
            if config.is_legacy:
                levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith(f"{PREFIX}.up."))
                widths = [len(state[f"{PREFIX}.up.{level}.block.0.conv2.weight"]) for level in range(levels)]
                config.hidden_channels = widths[0]
                config.channel_mult = [width // widths[0] for width in widths]
                in_the_middle = [key for key in state if key.startswith(f"{PREFIX}.mid.")]
                config.num_res_blocks = sum(key.endswith(".conv1.weight") for key in in_the_middle)
            grid = isqrt(len(state["decoder.positional_embedding"]) - 1)
            config.vit_dec_patch_size = config.resolution // grid
        except (KeyError, ValueError) as error:
            raise InputError(f"weights without {error}: expected those of a TiTok tokenizer") from error
        return config

    def unusual_settings(self) -> dict[str, Any]:
        return {} if self._use_l2_norm == self.is_legacy else {"use_l2_norm": self._use_l2_norm}

    @property
    def code_shape(self) -> tuple[int, ...]:
        return (self.config.num_latent_tokens,)

    @property
    def decoder_activations(self) -> int:
        length = 1 + self.decoder.num_patches + self.image_seq_len
        of_mlp = 4 * self.decoder.ln_pre.normalized_shape[0] * length
        return LIVE_ACTIVATIONS * max(self._channels * self.resolution**2, of_mlp)

    def encode_latents(self, images: Tensor) -> Tensor:
        return self.encoder(images, self.latent_tokens)

    def quantize_latents(self, latents: Tensor) -> Tensor:
        return self.quantize.nearest(latents)

    def codebook_lookup(self, codes: Tensor) -> Tensor:
        return self.quantize.lookup(codes)

    def _decode(self, codes: Tensor) -> Tensor:
        decoded = self.decoder(self.codebook_lookup(codes))
        if not self.is_legacy:
            return decoded
        probabilities = decoded.softmax(dim=1)  # (B, K, g, g)
        return self.pixel_decoder(torch.einsum("bkhw,kz->bzhw", probabilities, self.pixel_quantize.embedding.weight))

    def fast_decoder(self) -> nn.Module:
        plain = PlainDecoder(self)
        del plain.tokenizer.encoder
        if self.is_legacy:
            plain.tokenizer.pixel_decoder = fold_upsampling(self.pixel_decoder)
        return plain


def check_sizes(config: TiTokConfig) -> None:
    """Raise InputError for sizes that do not fit together."""
    for name in PATCH_SIZES:
        if config.resolution % getattr(config, name):
            raise InputError(
                f"model.vq_model.resolution={config.resolution}: expected a multiple of {name}={getattr(config, name)}"
            )
    factor = 2 ** (len(config.channel_mult) - 1)
    if config.is_legacy and config.vit_dec_patch_size != factor:
        raise InputError(
            f"model.vq_model.vit_dec_patch_size={config.vit_dec_patch_size}: expected {factor} "
            f"({len(config.channel_mult)} levels in channel_mult)"
        )


def _model_size(state: dict[str, Tensor], part: str) -> Any:
    """Config name of the size of encoder or decoder; raises KeyError for a missing or unknown transformer."""
    width = state[f"{part}.positional_embedding"].shape[1]
    layers = sum(key.startswith(f"{part}.transformer.") and key.endswith(".ln_1.weight") for key in state)
    return {(size.width, size.layers): name for name, size in SIZES.items()}[width, layers]
