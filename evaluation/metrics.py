"""Frechet distance and Inception Score, and the running sums over images that they are computed from.

Legend: B images, D feature width, C classes, S splits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.distributed import DistributedContext

SPLIT_SIZE = 5000  # images per split of the Inception Score, in the order of the file


@dataclass(frozen=True)
class Gaussian:
    mu: np.ndarray  # (D,) float64
    sigma: np.ndarray  # (D, D) float64


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a) + tr(sigma_b) - 2 tr sqrt(sigma_a sigma_b).

    With sigma = L L^T the last trace is the nuclear norm of L_a^T L_b. Unlike a matrix square root of the product, this
    never takes the root of an eigenvalue that is only rounding error, so fewer images than dimensions are no problem.
    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
    """
    trace_of_root = torch.linalg.svdvals(root_factor(a.sigma).T @ root_factor(b.sigma)).sum().item()
    difference = a.mu - b.mu
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace_of_root)


def root_factor(sigma: np.ndarray) -> Tensor:
    """L (D, r) with L L^T = sigma of rank r."""
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.from_numpy(sigma))  # (D,), (D, D)
    noise = eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps  # threshold of the numerical rank
    kept = eigenvalues > noise
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


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
        """All-reduce the sums over the processes."""
        self.count = ctx.all_reduce_sum(self.count)
        self.total = ctx.all_reduce_sum(self.total)
        self.outer = ctx.all_reduce_sum(self.outer)

    def gaussian(self) -> Gaussian:
        """Mean and covariance; the covariance divides by N - 1, as numpy.cov."""
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mu=mean.cpu().numpy(), sigma=covariance.cpu().numpy())


def classes_per_split(labels: np.ndarray) -> float:
    """exp of the mean entropy of the labels (N,) within the splits of the Inception Score, which is about the highest
    score that images with these labels can reach in this order."""
    split, row = np.arange(len(labels)) // SPLIT_SIZE, np.unique(labels, return_inverse=True)[1]
    pairs, counts = np.unique(np.stack([split, row]), axis=1, return_counts=True)
    shares = counts / np.bincount(split)[pairs[0]]  # of each label in its split
    return float(np.exp(-(counts * np.log(shares)).sum() / len(labels)))


class ScoreSums:
    """Per split of `SPLIT_SIZE` images: the sums of p and of p log p that the Inception Score needs."""

    def __init__(self, n_images: int, n_classes: int, device: torch.device) -> None:
        n_splits = -(-n_images // SPLIT_SIZE)
        self.counts = torch.zeros(n_splits, dtype=torch.float64, device=device)
        self.probs = torch.zeros(n_splits, n_classes, dtype=torch.float64, device=device)
        self.negative_entropy = torch.zeros(n_splits, dtype=torch.float64, device=device)

    def update(self, first_image: int, log_probs: Tensor) -> None:
        """Add log probabilities (B, C) float64 of consecutive images, the first of index `first_image` in the file."""
        split = torch.arange(first_image, first_image + len(log_probs), device=log_probs.device) // SPLIT_SIZE
        probs = log_probs.exp()
        self.counts.index_add_(0, split, torch.ones_like(probs[:, 0]))
        self.probs.index_add_(0, split, probs)
        self.negative_entropy.index_add_(0, split, (probs * log_probs).sum(1))

    def reduce(self, ctx: DistributedContext) -> None:
        """All-reduce the sums over the processes."""
        self.counts = ctx.all_reduce_sum(self.counts)
        self.probs = ctx.all_reduce_sum(self.probs)
        self.negative_entropy = ctx.all_reduce_sum(self.negative_entropy)

    def inception_score(self) -> float:
        """Mean over splits of exp(mean KL(p || mean p)); source: https://arxiv.org/abs/1606.03498.

        It depends on the order of the images: a file sorted by class scores far too low.
        """
        mean_probs = self.probs / self.counts[:, None]  # (S, C)
        kl = self.negative_entropy / self.counts - torch.special.xlogy(mean_probs, mean_probs).sum(1)  # (S,)
        return kl.exp().mean().item()
