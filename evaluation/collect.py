"""One pass of a file's images through a feature extractor."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.features import Extractor
from evaluation.moments import Moments, ScoreSums
from utils.distributed import DistributedContext
from utils.precision import matmul_precision


class Images(Protocol):
    """uint8 images of one size, read in slices."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, H, W, 3)."""


class Collected:
    """What the metrics need of N images; `spatial` and `score` are None where the extractor has no such features.

    Attributes:
        pool: moments of the pool features; spatial: of the spatial features.
        score: sums of the Inception Score.
        features: pool features (N, D) in the precision asked for, on the CPU; None if not asked for.
    """

    def __init__(self, n_images: int, extractor: Extractor, keep_as: torch.dtype | None, device: torch.device) -> None:
        self.pool = Moments(extractor.pool_dim, device)
        self.spatial = Moments(extractor.spatial_dim, device) if extractor.spatial_dim else None
        self.score = ScoreSums(n_images, extractor.n_classes, device) if extractor.n_classes else None
        self.features = torch.zeros(n_images, extractor.pool_dim, dtype=keep_as) if keep_as else None

    def reduce(self, ctx: DistributedContext) -> None:
        """Replace what this process has collected by what all have."""
        for sums in (self.pool, self.spatial, self.score):
            if sums is not None:
                sums.reduce(ctx)
        if self.features is not None:  # every process has zeros where the others have rows
            self.features = ctx.all_reduce_sum(self.features)


@torch.inference_mode()
@matmul_precision(tf32=False)
def collect(
    images: Images,
    extractor: Extractor,
    ctx: DistributedContext,
    device: torch.device,
    batch_size: int,
    title: str,
    keep_as: torch.dtype | None = None,
) -> Collected:
    """Extract the features of all images, in float32 without TF32. Each process takes consecutive batches, and these
    are the same for any number of processes.

    Args:
        title: of the progress bar.
        keep_as: the precision in which the pool features themselves are kept; None: they are not.

    Returns:
        the sums over all images, the same on every process.
    """
    result = Collected(len(images), extractor, keep_as, device)
    batches = -(-len(images) // batch_size)
    shares = (batches * rank // ctx.size * batch_size for rank in (ctx.rank, ctx.rank + 1))
    first, last = (min(share, len(images)) for share in shares)
    with tqdm(total=last - first, unit="image", desc=title, disable=None if ctx.is_rank0 else True) as bar:
        for start in range(first, last, batch_size):
            batch = images.read(start, min(start + batch_size, last))  # (B, H, W, 3)
            n = len(batch)
            features = extractor(_pad(batch, batch_size).to(device))
            result.pool.update(features.pool[:n])
            if result.spatial is not None and features.spatial is not None:
                result.spatial.update(features.spatial[:n])
            if result.score is not None and features.log_probs is not None:
                result.score.update(start, features.log_probs[:n])
            if result.features is not None:
                result.features[start : start + n] = features.pool[:n].to(result.features.dtype).cpu()
            bar.update(n)
    result.reduce(ctx)
    return result


def _pad(batch: np.ndarray, batch_size: int) -> Tensor:
    """Fill up with black images: kernels round by batch size, and no feature may depend on how the file is shared."""
    padded = np.zeros((batch_size, *batch.shape[1:]), np.uint8)
    padded[: len(batch)] = batch
    return torch.from_numpy(padded)
