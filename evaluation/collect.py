"""One pass of images through a feature extractor: the sums and features that the metrics need."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.features import Extractor, Features
from evaluation.metrics import Moments, ScoreSums
from utils.distributed import DistributedContext
from utils.precision import matmul_precision


class Images(Protocol):
    """uint8 images of one size, read in slices."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, H, W, 3)."""


class ImagesInMemory:
    """An array of images, uint8 (N, H, W, 3), with the interface of images in a file."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.images[start:stop]


class FeatureSums:
    """Sums over N images; `spatial` and `score` are None if the extractor has no such features.

    Attributes:
        pool: moments of the pool features.
        spatial: moments of the spatial features.
        score: sums of the Inception Score.
        features: pool features (N, D) on the CPU; None if not kept.
    """

    def __init__(self, n_images: int, extractor: Extractor, keep_as: torch.dtype | None, device: torch.device) -> None:
        self.pool = Moments(extractor.pool_dim, device)
        self.spatial = Moments(extractor.spatial_dim, device) if extractor.spatial_dim else None
        self.score = ScoreSums(n_images, extractor.n_classes, device) if extractor.n_classes else None
        self.features = torch.zeros(n_images, extractor.pool_dim, dtype=keep_as) if keep_as else None

    def update(self, first_image: int, features: Features, count: int) -> None:
        """Add the first `count` rows of `features`, of consecutive images from this index on."""
        self.pool.update(features.pool[:count])
        if self.spatial is not None and features.spatial is not None:
            self.spatial.update(features.spatial[:count])
        if self.score is not None and features.log_probs is not None:
            self.score.update(first_image, features.log_probs[:count])
        if self.features is not None:
            self.features[first_image : first_image + count] = features.pool[:count].to(self.features.dtype).cpu()

    def reduce(self, ctx: DistributedContext) -> None:
        """All-reduce the sums over the processes."""
        for sums in (self.pool, self.spatial, self.score):
            if sums is not None:
                sums.reduce(ctx)
        if self.features is not None:  # every process has zeros where others have rows
            self.features = ctx.all_reduce_sum(self.features)


@torch.inference_mode()
@matmul_precision(tf32=False)
def collect(
    images: Images,
    extractor: Extractor,
    ctx: DistributedContext,
    batch_size: int,
    title: str,
    device: torch.device | None = None,
    keep_as: torch.dtype | None = None,
) -> FeatureSums:
    """Extract the features of all images, in float32 without TF32. Each process takes consecutive batches, which are
    the same for any number of processes.

    Args:
        title: title of the progress bar.
        device: holds the sums; None: the device of `ctx`.
        keep_as: dtype in which the pool features are kept; None: they are not.

    Returns:
        sums over all images, equal on every process.
    """
    device = device or ctx.device
    sums = FeatureSums(len(images), extractor, keep_as, device)
    num_batches = -(-len(images) // batch_size)
    first = min(num_batches * ctx.rank // ctx.size * batch_size, len(images))
    last = min(num_batches * (ctx.rank + 1) // ctx.size * batch_size, len(images))
    with tqdm(total=last - first, unit="image", desc=title, disable=None if ctx.is_rank0 else True) as bar:
        for start in range(first, last, batch_size):
            batch = images.read(start, min(start + batch_size, last))  # (B, H, W, 3)
            sums.update(start, extractor(_pad(batch, batch_size).to(device)), count=len(batch))
            bar.update(len(batch))
    sums.reduce(ctx)
    return sums


def _pad(batch: np.ndarray, batch_size: int) -> Tensor:
    """Pad with black images: kernels round by batch size, and features must not depend on the number of processes."""
    padded = np.zeros((batch_size, *batch.shape[1:]), np.uint8)
    padded[: len(batch)] = batch
    return torch.from_numpy(padded)
