"""The tokenizer's codebook vectors as targets: the paper's, and a control."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from modeling.targets.target import Target
from modeling.tokenizers.tokenizer import Tokenizer
from utils.randomness import Stream, permutation, philox
from utils.schema import Config, TapConfig


class Codebook(Target):
    """The tokenizer's vector of each code: the paper's embedding regularization."""

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        self.tokenizer = tokenizer
        self.z_dim = tokenizer.codebook_dim
        self.description = "codebook vectors"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return self.tokenizer.codebook_lookup(codes)


class PermutedCodebook(Codebook):
    """The codebook vectors in a fixed random order: the vector of a different code. A control with the loss and the
    cost of `Codebook`, whose geometry says nothing about the codes."""

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        super().__init__(tap, config, tokenizer, num_samples)
        bits = philox(Stream.CODEBOOK_PERMUTATION, config.training.seed, 0)
        order = permutation(bits, tokenizer.codebook_size).astype(np.int64)
        self.permutation = torch.from_numpy(order).to(next(tokenizer.parameters()).device)  # (V,)
        self.description = f"codebook vectors, permuted by training.seed={config.training.seed}"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return super().vectors(self.permutation[codes], batch)
