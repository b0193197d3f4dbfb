"""Frechet distance of a few samples to validation images, for the curve of a run.

It is biased upwards, more so at smaller N: it is comparable at the same N, backend and validation images only, and not
with published FID. N and the backend are part of the metric's name.
"""

from collections.abc import Callable

import numpy as np
import torch

from evaluation.collect import Images, collect
from evaluation.features import EfficientNetLite0, Extractor
from evaluation.inception import Inception, find_cached_weights
from evaluation.metrics import Gaussian, frechet_distance
from utils.distributed import DistributedContext
from utils.errors import InputError, NonFiniteError

Generate = Callable[[list[int]], np.ndarray]  # indices of samples -> uint8 (B, H, W, 3)


class SampleDistance:
    """The features of the validation images are computed once. All ranks call every method.

    Args:
        validation: images to compare with, of the size of the samples.
        num_samples: N.
        batch_size: images that a rank generates and extracts features of at once.

    Attributes:
        key: name of the metric: val/fid_<N> with Inception features, else val/frechet_lite0_<N>.

    Raises:
        InputError: fewer than 2 validation images, or no feature extractor.
    """

    def __init__(self, validation: Images, num_samples: int, batch_size: int, ctx: DistributedContext) -> None:
        if len(validation) < 2:
            raise InputError(
                f"experiment.eval_samples={num_samples}: found {len(validation)} validation images, expected at least 2"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.ctx = ctx
        name, self.extractor = ctx.rank0_first(lambda: find_extractor(ctx.device, "experiment.eval_samples"))
        self.key = f"val/{name}_{num_samples}"
        self.image_shape = validation.read(0, 1).shape[1:]
        self.validation = self._gaussian(validation, "validation images")

    def __call__(self, generate: Generate) -> dict[str, float]:
        """The distance by name, equal on all ranks and for any number of them; NaN if the model computes NaN or
        infinity."""
        samples = _Samples(generate, self.num_samples, self.image_shape)
        of_samples = self._gaussian(samples, "samples")
        if self.ctx.all_reduce_max(torch.tensor(int(samples.failed))):
            return {self.key: float("nan")}
        return {self.key: self.ctx.broadcast_from_rank0(lambda: frechet_distance(self.validation, of_samples))}

    def _gaussian(self, images: Images, title: str) -> Gaussian:
        return collect(images, self.extractor, self.ctx, batch_size=self.batch_size, title=title).pool.gaussian()


def find_extractor(device: torch.device, needed_by: str) -> tuple[str, Extractor]:
    """Inception if its weights are in torch hub's cache, else EfficientNet-Lite0; with the name of the distance.

    Args:
        needed_by: config key, for the error.

    Raises:
        InputError: neither is there, or damaged weights.
    """
    try:
        weights = find_cached_weights()
    except InputError as no_weights:
        try:
            return "frechet_lite0", EfficientNetLite0(device)
        except ImportError as error:
            raise InputError(
                f"{needed_by}: expected Inception weights or the package {error.name} "
                f"(requirements-dev.txt), found neither ({str(no_weights).removeprefix('--inception: ')})"
            ) from error
    return "fid", Inception(device, weights)


class _Samples:
    """Samples, generated when read. After a failure they are black, as the other ranks wait for the sums."""

    def __init__(self, generate: Generate, count: int, image_shape: tuple[int, ...]) -> None:
        self.generate = generate
        self.count = count
        self.image_shape = image_shape
        self.failed = False

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> np.ndarray:
        try:
            return self.generate(list(range(start, stop)))
        except NonFiniteError:
            self.failed = True
            return np.zeros((stop - start, *self.image_shape), np.uint8)
