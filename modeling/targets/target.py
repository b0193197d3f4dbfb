"""The interface of all targets of taps.

A new target is a class like `Codebook` in a file of its own, and a line in registry.py.

Legend: B images, N codes per image, H x W pixels, V codebook size, Z width of a target vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from modeling.tokenizers.tokenizer import Tokenizer
from utils.schema import Config, TapConfig


class Target(ABC):
    """
    Attributes:
        needs_images: the batches must have images.
        of_training_samples: there are vectors for the samples of the training data only.
        z_dim: Z.
        description: for the log.
    """

    needs_images: ClassVar[bool] = False
    of_training_samples: ClassVar[bool] = False
    z_dim: int
    description: str

    @abstractmethod
    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        """On the device of the tokenizer; `num_samples` is the size of the training data, if known. Raises InputError
        if something is missing or does not fit."""

    @abstractmethod
    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Target vectors (B, N, Z), without gradients.

        Args:
            codes: (B, N) clean codes in raster order.
            batch: on the device: `index` (B,) of the samples in the data and, if needed, `image` (B, 3, H, W).
        """


def key_of(tap: TapConfig) -> str:
    """The beginning of an error message."""
    return f"model.generator.taps: {tap.name!r}"
