"""The MaskGIT-VQ tokenizer: a convolutional VQGAN without attention, images to codes and back.

The defaults of `VQModelConfig` are the published f16 model (MaskGIT, https://arxiv.org/abs/2202.04200, in the PyTorch
port that RAR uses, `maskgit-vqgan-imagenet-f16-256.bin`); its state-dict keys are those of that file and never change.

Legend: B images, H x W pixels, L levels (each but the last halves the size), h = H / 2^(L-1), w likewise,
N = h * w codes per image in raster order, V codebook size, Z width of a codebook vector.
"""

import copy

from einops import rearrange
from torch import Tensor, nn

from modeling.tokenizers.maskgit_layers import MIN_GROUP_WIDTH, Decoder, Encoder, fold_upsampling
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.tokenizers.vector_quantizer import QuantizerOutput, VectorQuantizer
from utils.errors import InputError
from utils.schema import VQModelConfig

LIVE_ACTIVATIONS = 6  # tensors of the size of the widest full-resolution one that exist at a time, at most


class MaskGitVQ(Tokenizer):
    """Images in [0, 1] without further normalization <-> codes in raster order."""

    def __init__(self, config: VQModelConfig) -> None:
        """
        Raises:
            InputError: sizes that do not fit together.
        """
        super().__init__(config)
        if config.hidden_channels % MIN_GROUP_WIDTH:
            raise InputError(
                f"model.vq_model.hidden_channels={config.hidden_channels}: expected a multiple of {MIN_GROUP_WIDTH}"
            )
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.token_size)

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

    @property
    def decoder_activations(self) -> int:
        return LIVE_ACTIVATIONS * self.decoder.norm_out.num_channels * self.resolution**2

    def no_weight_decay(self) -> set[str]:
        """Parameters that decay would harm: the codebook (norms and biases are one-dimensional and never decay)."""
        return {"quantize.embedding.weight"}

    def features(self, images: Tensor) -> Tensor:
        return rearrange(self.encoder(images), "b z h w -> b (h w) z")

    def look_up(self, features: Tensor) -> Tensor:
        return self.quantize.nearest(features)

    def embed(self, codes: Tensor) -> Tensor:
        return self.quantize.embedding(codes)

    def _decode(self, codes: Tensor) -> Tensor:
        return self.decoder(vectors_on_grid(self.quantize.embedding, codes, self.code_shape))

    def fast_decoder(self) -> nn.Module:
        return FoldedDecoder(self)

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """For training: unclamped reconstructions (B, 3, H, W) of images (B, 3, H, W) and the quantizer's losses."""
        quantizer_output = self.quantize(self.encoder(images))
        return self.decoder(quantizer_output.quantized), quantizer_output


class FoldedDecoder(nn.Module):
    """The decoder with folded upsampling, codes (B, N) -> images (B, 3, H, W), not clamped."""

    def __init__(self, tokenizer: MaskGitVQ) -> None:
        super().__init__()
        self.embedding = copy.deepcopy(tokenizer.quantize.embedding)
        self.decoder = fold_upsampling(tokenizer.decoder)
        self.code_shape = tokenizer.code_shape

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(vectors_on_grid(self.embedding, codes, self.code_shape))


def vectors_on_grid(embedding: nn.Embedding, codes: Tensor, code_shape: tuple[int, ...]) -> Tensor:
    """Codebook vectors (B, Z, h, w) of codes (B, N)."""
    return rearrange(embedding(codes), "b (h w) z -> b z h w", h=code_shape[0])
