"""Two files of samples against one reference: the difference of their Frechet distances, and how much of it the choice
of images may explain.

Legend: N samples in each file, D feature width, r rank of the reference's covariance.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.metrics import Gaussian, frechet_distance, root_factor
from utils.distributed import DistributedContext

RESAMPLES = 200
SCOPE = (
    "The interval is over the choice of these images. It says nothing about retraining with another seed, which can "
    "move each distance by more (docs/studies.md compares over seeds)."
)


@dataclass(frozen=True)
class Difference:
    """Frechet distances of A and B, B - A, and the limits of its 95 % bootstrap interval over images."""

    a: float
    b: float
    difference: float
    low: float
    high: float


class _Projected:
    """Samples whose Frechet distance to a fixed reference is computed many times, for different choices of rows.

    tr sqrt(sigma_reference sigma) is the sum of the roots of the eigenvalues of L^T sigma L with L L^T =
    sigma_reference, so it needs the features times L only.
    """

    def __init__(self, reference: Gaussian, features: Tensor) -> None:
        factor = root_factor(reference.sigma).to(features.device)  # (D, r)
        self.shifted = features.double() - torch.from_numpy(reference.mu).to(features.device)  # (N, D)
        self.squares = self.shifted.square().sum(1)  # (N,)
        self.projected = self.shifted @ factor  # (N, r)
        self.reference_trace = float(np.trace(reference.sigma))

    def distance(self, rows: Tensor) -> float:
        """Frechet distance of these rows (N,), which may repeat, to the reference."""
        count = len(rows)
        shift = self.shifted[rows].mean(0)  # (D,), mean of the samples minus mean of the reference
        trace = (self.squares[rows].sum() - count * shift.square().sum()) / (count - 1)
        centred = self.projected[rows]  # (N, r)
        centred = centred - centred.mean(0)
        narrow = centred.T if count > centred.shape[1] else centred
        roots = torch.linalg.eigvalsh(narrow @ narrow.T / (count - 1)).clamp(min=0).sqrt()
        return float(shift.square().sum() + self.reference_trace + trace - 2 * roots.sum())


def compare(reference: Gaussian, features_a: Tensor, features_b: Tensor, ctx: DistributedContext) -> Difference:
    """Resample the images of both files together, so that what images of one index share (class, random numbers)
    narrows the interval. The processes of `ctx` share the resamples.

    Args:
        features_a, features_b: (N, D) each.
    """
    assert features_a.shape == features_b.shape
    a, b = _Projected(reference, features_a), _Projected(reference, features_b)
    count = len(features_a)
    rng = np.random.default_rng(0)
    choices = [rng.integers(count, size=count) for _ in range(RESAMPLES)]
    differences = torch.zeros(RESAMPLES, dtype=torch.float64, device=features_a.device)
    mine = range(ctx.rank, RESAMPLES, ctx.size)
    for index in tqdm(mine, desc="bootstrap", unit="resample", disable=None if ctx.is_rank0 else True):
        rows = torch.from_numpy(choices[index]).to(features_a.device)
        differences[index] = b.distance(rows) - a.distance(rows)
    low, high = np.quantile(ctx.all_reduce_sum(differences).cpu().numpy(), [0.025, 0.975])
    of_a, of_b = (frechet_distance(reference, _gaussian(features)) for features in (features_a, features_b))
    return Difference(a=of_a, b=of_b, difference=of_b - of_a, low=float(low), high=float(high))


def _gaussian(features: Tensor) -> Gaussian:
    values = features.double().cpu().numpy()
    return Gaussian(mu=values.mean(0), sigma=np.cov(values, rowvar=False))
