"""Sequences of tokens from the distribution that a model defines: temperature 1, no guidance, no top-k or top-p, raster
order. With `Stream.SAMPLING`, sequence i is also sequence i of scripts/sample_imagenet_rear.py.

Legend: B sequences, N codes each.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modeling.rear import ReAR
from modeling.sampling.generate import LOGITS_NOT_FINITE, CodeSampler, codes_in_range
from modeling.sampling.image_sampler import class_labels_of
from utils.errors import NonFiniteError
from utils.randomness import Stream, image_uniforms


class ModelSamples:
    """Sequence i has class i mod C and depends on (weights, seed, stream, i) only. Two models get the same random
    numbers.

    Args:
        model: in eval mode; its weights must not change while this object is used.
    """

    def __init__(self, model: ReAR, seed: int, stream: Stream = Stream.SAMPLING) -> None:
        self.model = model
        self.seed = seed
        self.stream = stream
        generator = replace(model.config.generator, guidance_scale=1.0, randomize_temperature=1.0, top_k=0, top_p=1.0)
        self.sampler = CodeSampler(model, generator)

    def __call__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes (B, N) and class labels (B,), int64 on the model's device.

        Raises:
            NonFiniteError: logits that are not finite.
        """
        labels = torch.from_numpy(class_labels_of(indices, self.model.num_classes))
        codes = self.sampler(labels, image_uniforms(self.seed, list(indices), self.model.image_seq_len, self.stream))
        if not codes_in_range(codes, self.model.codebook_size):
            raise NonFiniteError(LOGITS_NOT_FINITE)
        return codes, labels.to(codes.device)
