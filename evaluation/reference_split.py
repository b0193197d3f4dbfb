"""Scores against two halves of a reference: one half chooses among samples, the other scores what was chosen."""

import numpy as np

from evaluation.collect import Collected, Images, collect
from evaluation.features import Extractor
from evaluation.metrics import frechet_distance
from utils.distributed import DistributedContext
from utils.randomness import Stream, permutation, philox

HALVES = ("choosing_half", "other_half")


class SplitReference:
    """Holds the moments of both halves, drawn at random and always the same. All ranks call every method.

    A distance to half a reference is larger than one to all of it: it compares with distances of the same N, features
    and reference only.

    Args:
        images: at least 4.
        batch_size: images that a rank makes or reads, and whose features it computes, at once.
    """

    def __init__(self, images: Images, extractor: Extractor, batch_size: int, ctx: DistributedContext) -> None:
        self.extractor, self.batch_size, self.ctx = extractor, batch_size, ctx
        halves = np.array_split(permutation(philox(Stream.REFERENCE_HALVES, 0, 0), len(images)), 2)
        self.moments = {
            name: self._collect(_Rows(images, np.sort(rows)), name).pool.mean_and_covariance()
            for name, rows in zip(HALVES, halves, strict=True)
        }

    def scores(self, samples: Images, title: str) -> dict[str, float]:
        """Of at least 2 samples, the same on all ranks: the Frechet distance to each half and, with Inception, their
        `inception_score`.

        Args:
            title: of the progress bar.
        """
        collected = self._collect(samples, title)
        of_samples = collected.pool.mean_and_covariance()
        scores = self.ctx.broadcast_from_rank0(
            lambda: {name: frechet_distance(*moments, *of_samples) for name, moments in self.moments.items()}
        )
        return scores | ({"inception_score": collected.score.inception_score()} if collected.score else {})

    def _collect(self, images: Images, title: str) -> Collected:
        return collect(images, self.extractor, self.ctx, self.ctx.device, self.batch_size, title)


class _Rows:
    """Some of the images of a file."""

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([self.images.read(row, row + 1) for row in self.rows[start:stop]])
