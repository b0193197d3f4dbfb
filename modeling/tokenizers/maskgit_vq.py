"""The MaskGIT-VQ tokenizer: a convolutional VQGAN without attention, images to codes and back.

The defaults of `VQModelConfig` are the published f16 model (MaskGIT, https://arxiv.org/abs/2202.04200, in the PyTorch
port that RAR uses, `maskgit-vqgan-imagenet-f16-256.bin`); its state-dict keys are those of that file and never change.

Legend: B images, H x W pixels, L levels (each but the last halves the size), h = H / 2^(L-1), w likewise,
N = h * w codes per image in raster order, V codebook size, Z width of a codebook vector.
"""

from einops import rearrange
from torch import Tensor, nn

from modeling.tokenizers.maskgit_layers import MIN_GROUP_WIDTH, Decoder, Encoder
from modeling.tokenizers.vector_quantizer import QuantizerOutput, VectorQuantizer
from utils.errors import InputError
from utils.files.hub import local_file
from utils.files.weights import load_state_dict, load_strict
from utils.schema import Config, VQModelConfig


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
