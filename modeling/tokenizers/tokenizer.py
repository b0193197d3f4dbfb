"""The interface of all tokenizers: images to codes, codes to codebook vectors, codes to images.

Scripts and sampling know this class only; `modeling/tokenizers/registry.py` chooses the one that a config names.

Legend: B images, H = W pixels, N codes per image, V codebook size, Z width of a codebook vector.
"""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from modeling.input_validation import check_images, checked_codes
from modeling.pretrained_model import PretrainedModel
from modeling.tokenizers.vector_quantizer import QuantizerOutput
from utils.errors import InputError, NonFiniteError
from utils.files.hashing import hash_of
from utils.files.weights import load_state_dict, load_strict, weights_sha256
from utils.schema import Config, ConvTokenizerConfig, TokenizerConfig, VQModelConfig

T = TypeVar("T", bound="Tokenizer")

# Keys of some tokenizers only. Those of convolutional networks are ignored by codes_only.
OWN_KEYS = {field.name for field in fields(VQModelConfig)} - {field.name for field in fields(ConvTokenizerConfig)}


class Tokenizer(PretrainedModel, ABC):
    """Images in [0, 1] <-> codes; a network that works in a different range converts inside.

    A new tokenizer implements the abstract methods and is added to the table of registry.py. Names of its parameters
    must not begin with one of the `WRAPPERS` of `utils.files.weights`.

    Attributes:
        config_class: dataclass with the keys of `model.vq_model` that it reads.
        config: its values.
        model_type: its name in the config.
        codebook_size: V; codebook_dim: Z.
        resolution: H = W in pixels.
        has_images: False: it has codes and their vectors only, and what needs images raises `no_images`.
    """

    config_class: ClassVar[type[TokenizerConfig]] = TokenizerConfig
    has_images: ClassVar[bool] = True
    config: TokenizerConfig
    model_type: str
    codebook_size: int
    codebook_dim: int
    resolution: int

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.codebook_size, self.codebook_dim = config.codebook_size, config.token_size
        self.resolution = config.resolution

    def sections(self) -> dict[str, Any]:
        return {"model": {"vq_model": asdict(self.config)}}

    @classmethod
    def from_config(cls: type[T], config: Config) -> T:
        return cls.from_section(config.model.vq_model)

    @classmethod
    def from_section(cls: type[T], section: VQModelConfig) -> T:
        """Build from `model.vq_model`, which has the keys of all tokenizers.

        Raises InputError for sizes that do not fit together, or a value for a key of a different tokenizer.
        """
        own = {field.name for field in fields(cls.config_class)}
        values = {field.name: getattr(section, field.name) for field in fields(section)}
        for name, value in values.items():
            if name in OWN_KEYS - own and value != getattr(VQModelConfig(), name):
                raise InputError(f"model.vq_model.{name}={value}: {section.model_type} does not read it; leave it out")
        return cls(cls.config_class(**{name: values[name] for name in own}))

    def load_weights(self, path: Path) -> None:
        load_strict(self, self.weights_of(self.read_state(path), path), path)

    @classmethod
    def read_state(cls, path: Path) -> dict[str, Tensor]:
        """The state dict in a file of weights."""
        return load_state_dict(path)

    @classmethod
    @abstractmethod
    def config_from_state_dict(cls, state: dict[str, Tensor]) -> TokenizerConfig:
        """Config of the tokenizer with this state dict; keys that it does not determine, such as the resolution, keep
        their defaults. Raises InputError for keys of a different model."""

    @classmethod
    def weights_of(cls, state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
        """The weights among the entries of a file, without other known entries of published files.

        Raises InputError, with `source` in the message, if an entry that is left out has an unexpected value.
        """
        return state

    @abstractmethod
    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents (B, N, Z) of images (B, 3, H, W) in [0, 1], before quantization."""

    @abstractmethod
    def quantize_latents(self, latents: Tensor) -> Tensor:
        """Codes (B, N) int64 of latents (B, N, Z)."""

    @abstractmethod
    def codebook_lookup(self, codes: Tensor) -> Tensor:
        """Codebook vectors (B, N, Z) of codes (B, N), in the form that `quantize_latents` compares with latents."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """`decode_unclamped` of codes of the right shape."""

    @property
    @abstractmethod
    def decoder_activations(self) -> int:
        """Largest number of activations in memory while one image is decoded; limits the batch size on a GPU."""

    @property
    @abstractmethod
    def code_shape(self) -> tuple[int, ...]:
        """(rows, columns) of a grid in raster order, or (N,) without a grid."""

    @property
    def image_seq_len(self) -> int:
        """N."""
        return math.prod(self.code_shape)

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, N) int64, from 0 to V - 1, of images (B, 3, H, W) in [0, 1], H = W = resolution.

        Any float type is converted to the type of the weights. On a GPU the checks synchronize;
        `quantize_latents(encode_latents(images))` skips them.

        Raises:
            ValueError: wrong image shape, no floats, or values outside [0, 1].
            NonFiniteError: latents that are not finite.
        """
        check_images(images, self.resolution)
        latents = self.encode_latents(images.to(next(self.parameters()).dtype))
        if not latents.isfinite().all():
            raise NonFiniteError("the tokenizer's latents are not finite: its weights are damaged")
        return self.quantize_latents(latents)

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W), clamped to [0, 1], of codes (B, N).

        Raises:
            ValueError: wrong number of codes per image, no integers, or codes outside 0 to V - 1.
        """
        return self.decode_unclamped(codes).clamp(0.0, 1.0)

    def decode_unclamped(self, codes: Tensor) -> Tensor:
        """The decoder's output (B, 3, H, W) for codes (B, N); its checks synchronize on a GPU."""
        return self._decode(checked_codes(codes, self.image_seq_len, self.codebook_size - 1))

    def fast_decoder(self) -> nn.Module:
        """`decode_unclamped` as a module with its own parameters, which may be cast to another precision or memory
        format. Override it where there is a faster form."""
        return PlainDecoder(self)

    def no_images(self, purpose: str) -> InputError:
        """The error for a `purpose` that needs images."""
        return InputError(
            f"{purpose}: needs images, and model.vq_model.model_type={self.model_type} has codes only; encode and "
            "decode images with the tokenizer of the codes, outside this program"
        )

    def unusual_settings(self) -> dict[str, Any]:
        """Settings that decide codes or images, do not follow from the weights, and differ from published models."""
        return {}

    def sha256(self) -> str:
        """Hash of names, shapes and values of the weights and, if there are any, of the unusual settings."""
        weights, settings = weights_sha256(self), self.unusual_settings()
        return hash_of({"weights": weights, **settings}) if settings else weights


class PlainDecoder(nn.Module):
    """A copy of a tokenizer, codes (B, N) -> images (B, 3, H, W), not clamped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = copy.deepcopy(tokenizer)

    def forward(self, codes: Tensor) -> Tensor:
        return self.tokenizer._decode(codes)


class TrainableTokenizer(Tokenizer):
    """A tokenizer that scripts/train_tokenizer.py trains."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Unclamped reconstructions (B, 3, H, W) of images (B, 3, H, W) in [0, 1], and the quantizer's losses."""

    def init_from_images(self, images: Tensor) -> None:
        """Set weights from training images (B, 3, H, W) in [0, 1] before the first step; most tokenizers have random
        ones."""
        return

    @abstractmethod
    def set_vectors(self, codes: Tensor, latents: Tensor) -> None:
        """Replace the codebook vectors of codes (K,) by latents (K, Z), in place."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: the codebook (1-D ones never decay)."""
