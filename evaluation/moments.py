"""Running sums over images, on any number of processes, from which the metrics are computed."""

import numpy as np
import torch
from torch import Tensor

from utils.distributed import DistributedContext

SPLIT_SIZE = 5000  # images per split of the Inception Score, in the order of the file


class Moments:
    """Count, sum and sum of outer products of D-dimensional rows, in float64."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add the rows of (B, D)."""
        features = features.double()
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def reduce(self, ctx: DistributedContext) -> None:
        """Replace the sums of this process by those over all processes."""
        self.count, self.total, self.outer = (ctx.all_reduce_sum(x) for x in (self.count, self.total, self.outer))

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(D,) and (D, D), float64; the covariance divides by N - 1, as numpy.cov does."""
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


class ScoreSums:
    """Per split of `SPLIT_SIZE` images: the sums over p and over p log p that the Inception Score needs."""

    def __init__(self, n_images: int, n_classes: int, device: torch.device) -> None:
        n_splits = -(-n_images // SPLIT_SIZE)
        self.counts = torch.zeros(n_splits, dtype=torch.float64, device=device)
        self.probs = torch.zeros(n_splits, n_classes, dtype=torch.float64, device=device)
        self.negative_entropy = torch.zeros(n_splits, dtype=torch.float64, device=device)

    def update(self, first_image: int, log_probs: Tensor) -> None:
        """Add consecutive images, the first of which has this index in the file; log_probs (B, C) float64."""
        split = torch.arange(first_image, first_image + len(log_probs), device=log_probs.device) // SPLIT_SIZE
        probs = log_probs.exp()
        self.counts.index_add_(0, split, torch.ones_like(probs[:, 0]))
        self.probs.index_add_(0, split, probs)
        self.negative_entropy.index_add_(0, split, (probs * log_probs).sum(1))

    def reduce(self, ctx: DistributedContext) -> None:
        """Replace the sums of this process by those over all processes."""
        self.counts, self.probs, self.negative_entropy = (
            ctx.all_reduce_sum(x) for x in (self.counts, self.probs, self.negative_entropy)
        )

    def inception_score(self) -> float:
        """Mean over splits of exp(mean KL(p || mean p)). Source: Salimans et al. 2016, https://arxiv.org/abs/1606.03498.

        It depends on the order of the images: a file sorted by class scores far too low.
        """
        mean_probs = self.probs / self.counts[:, None]  # (S, C)
        kl = self.negative_entropy / self.counts - torch.special.xlogy(mean_probs, mean_probs).sum(1)  # (S,)
        return kl.exp().mean().item()
