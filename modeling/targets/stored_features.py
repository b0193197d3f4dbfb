"""Vectors in a file as targets."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling.targets.target import Target, key_of
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import InputError
from utils.keys import ConfigError
from utils.schema import Config, TapConfig


class StoredFeatures(Target):
    """Vectors in a file, `source`: a .npy of (n, N, Z) or, equal for all codes of an image, (n, Z), with a row for each
    sample of the training data in their order. It is memory-mapped."""

    of_training_samples = True

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        if tap.source is None:
            raise ConfigError(f"{key_of(tap)}: found no source, expected an .npy file")
        try:
            self.rows = np.load(Path(tap.source), mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{tap.source}: cannot be read as an .npy file: {str(error).splitlines()[0]}") from error
        shape, count = self.rows.shape, tokenizer.image_seq_len
        if self.rows.dtype.kind != "f" or len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != count):
            raise InputError(
                f"{tap.source}: found {self.rows.dtype} {shape}, expected floats (n, {count}, Z) or (n, Z)"
            )
        if num_samples not in (None, shape[0]):
            raise InputError(
                f"{tap.source}: found {shape[0]} rows, expected {num_samples}, one for each training sample"
            )
        self.z_dim = shape[-1]
        self.description = f"{tap.source}, {shape}"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        rows = torch.from_numpy(self.rows[batch["index"].cpu().numpy()]).to(codes.device)
        return rows if rows.ndim == 3 else rows[:, None].expand(-1, codes.shape[1], -1)
