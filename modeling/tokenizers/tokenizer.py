"""What every tokenizer offers, whatever its network: images to codes, codes to codebook vectors, codes to images.

Scripts and sampling know this class only; `modeling/tokenizers/registry.py` chooses the one that a config names.

Legend: B images, H = W pixels, N codes per image, V codebook size, Z width of a codebook vector.
"""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from modeling.input_validation import check_images, checked_codes
from modeling.pretrained_model import PretrainedModel
from modeling.tokenizers.vector_quantizer import QuantizerOutput
from utils.errors import InputError, NonFiniteError
from utils.files.weights import load_state_dict, load_strict, weights_sha256
from utils.schema import Config, VQModelConfig

T = TypeVar("T", bound="Tokenizer")


class Tokenizer(PretrainedModel, ABC):
    """Images in [0, 1] <-> codes; a network that works in another range converts inside.

    A new tokenizer implements the abstract methods below and enters the table of registry.py; it overrides
    `fast_decoder` where it has a faster form. Names of its parameters begin with none of the `WRAPPERS` of
    `utils.files.weights`.

    Attributes:
        own_keys: keys of `model.vq_model` that not every kind of tokenizer reads, but this one.
        config: its sizes.
        model_type: its name in the config.
        codebook_size: V; codebook_dim: Z.
        code_shape: (rows, columns) of a grid whose codes stand in raster order, or (N,) of codes without a grid.
        resolution: H = W in pixels.
        has_images: False of one that knows codes and their vectors alone; what wants images raises `no_images`.
    """

    own_keys: ClassVar[tuple[str, ...]] = ()
    has_images: ClassVar[bool] = True
    config: VQModelConfig
    model_type: str
    codebook_size: int
    codebook_dim: int
    code_shape: tuple[int, ...]
    resolution: int

    def __init__(self, config: VQModelConfig) -> None:
        """
        Raises:
            InputError: sizes that do not fit together.
        """
        super().__init__()
        self.config = config
        self.codebook_size, self.codebook_dim = config.codebook_size, config.token_size
        self.resolution, self.code_shape = config.resolution, self.code_shape_of(config)
        self.model_type = config.model_type

    def sections(self) -> dict[str, Any]:
        return {"model": {"vq_model": asdict(self.config)}}

    @classmethod
    def from_config(cls: type[T], config: Config) -> T:
        return cls(config.model.vq_model)

    def load_weights(self, path: Path) -> None:
        load_strict(self, self.weights_of(self.read_state(path), path), path)

    @classmethod
    def read_state(cls, path: Path) -> dict[str, Tensor]:
        """The state dict in a file of weights; raises as `load_state_dict`."""
        return load_state_dict(path)

    @classmethod
    @abstractmethod
    def code_shape_of(cls, config: VQModelConfig) -> tuple[int, ...]:
        """`code_shape` of a tokenizer of these sizes, without building it.

        Raises:
            InputError: sizes that do not fit together.
        """

    @classmethod
    @abstractmethod
    def sizes_of(cls, state: dict[str, Tensor]) -> VQModelConfig:
        """Sizes of the tokenizer with this state dict; what is not in it (such as the resolution) stays default.

        Raises:
            InputError: keys of another model.
        """

    @classmethod
    def weights_of(cls, state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
        """The weights among the entries of a file; where published files hold more than these, it is left out by name.

        Args:
            source: where the entries come from, for the error message.

        Raises:
            InputError: what is left out is not what it must be.
        """
        return state

    @abstractmethod
    def encode_latents(self, images: Tensor) -> Tensor:
        """Features (B, N, Z) of images as `encode` takes them, before they become codes."""

    @abstractmethod
    def quantize_latents(self, features: Tensor) -> Tensor:
        """Codes (B, N) int64 of features (B, N, Z)."""

    @abstractmethod
    def codebook_lookup(self, codes: Tensor) -> Tensor:
        """Codebook vectors (B, N, Z) of codes (B, N), in the form that `quantize_latents` compares with features."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """`decode_unclamped` of codes of the right shape."""

    @property
    @abstractmethod
    def decoder_activations(self) -> int:
        """Numbers that decoding one image keeps in memory at a time, at most; a GPU's batch follows from it."""

    @property
    def image_seq_len(self) -> int:
        """N."""
        return math.prod(self.code_shape)

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, N) int64, from 0 to V - 1, of images (B, 3, H, W) in [0, 1], H = W = resolution.

        Any float type is converted to that of the weights. On a GPU this waits for the images and their features;
        `quantize_latents(features(images))` is the same without the checks.

        Raises:
            ValueError: another image shape, no floats, or values outside [0, 1].
            NonFiniteError: features that are not finite, whose codes would mean nothing.
        """
        check_images(images, self.resolution)
        features = self.encode_latents(images.to(next(self.parameters()).dtype))
        if not features.isfinite().all():
            raise NonFiniteError("the tokenizer's features are not finite: its weights are damaged, or no use")
        return self.quantize_latents(features)

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W), clamped to [0, 1], of codes (B, N).

        Raises:
            ValueError: another number of codes per image, no integers, or codes outside 0 to V - 1.
        """
        return self.decode_unclamped(codes).clamp(0.0, 1.0)

    def decode_unclamped(self, codes: Tensor) -> Tensor:
        """The decoder's raw output (B, 3, H, W) for codes (B, N); raises as `decode`, on a GPU waits for the codes."""
        return self._decode(checked_codes(codes, self.image_seq_len, self.codebook_size - 1))

    def fast_decoder(self) -> nn.Module:
        """`decode_unclamped` as a module that shares no parameters with this one: it may be cast to another precision,
        in which its output then is, or laid out in memory in another way. Here it is the same network."""
        return PlainDecoder(self)

    def no_images(self, purpose: str) -> InputError:
        """To be raised where `purpose`, for the message, wants images of a tokenizer without."""
        return InputError(
            f"{purpose}: wants images, and model.vq_model.model_type={self.model_type} knows codes alone; images are "
            "encoded and decoded by the tokenizer that the codes are from, outside of this program"
        )

    def sha256(self) -> str:
        """Hash of names, shapes and values of the weights, whatever file they came from."""
        return weights_sha256(self)


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

    @abstractmethod
    def set_vectors(self, codes: Tensor, features: Tensor) -> None:
        """Put features (K, Z) in place of the codebook vectors of codes (K,), in place."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Parameters that decay would harm: the codebook (norms and biases are one-dimensional and never decay)."""
