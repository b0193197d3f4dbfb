"""Scores against two halves of a reference: one half selects among samples, the other scores the selection."""

import numpy as np

from evaluation.collect import FeatureSums, Images, collect
from evaluation.features import Extractor
from evaluation.metrics import frechet_distance
from utils.distributed import DistributedContext
from utils.randomness import Stream, permutation, philox

HALVES = ("choosing_half", "other_half")


class SplitReference:
    """Two random halves of a reference, the same every time. All ranks call every method.

    A distance to half a reference is larger than one to all of it: it is comparable at the same N, features and
    reference only.

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
            self.gaussians[name] = self._collect(_Rows(images, np.sort(rows)), name).pool.gaussian()

    def scores(self, samples: Images, title: str) -> dict[str, float]:
        """Frechet distance of at least 2 samples to each half and, with Inception, `inception_score`.

        Args:
            title: of the progress bar.
        """
        sums = self._collect(samples, title)
        of_samples = sums.pool.gaussian()
        scores = self.ctx.broadcast_from_rank0(
            lambda: {name: frechet_distance(half, of_samples) for name, half in self.gaussians.items()}
        )
        if sums.score is not None:
            scores["inception_score"] = sums.score.inception_score()
        return scores

    def _collect(self, images: Images, title: str) -> FeatureSums:
        return collect(images, self.extractor, self.ctx, batch_size=self.batch_size, title=title)


class _Rows:
    """Some of the images of a file."""

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        self.images = images
        self.rows = rows.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([self.images.read(row, row + 1) for row in self.rows[start:stop]])
