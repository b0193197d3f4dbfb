"""The Frechet distance between two Gaussians."""

import numpy as np
import torch


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr sqrt(sigma1 sigma2), for means (D,) and covariances (D, D).

    With sigma = L L^T the last trace is the nuclear norm of L1^T L2. Unlike a matrix square root of the product this
    never takes the root of an eigenvalue that is rounding noise, so fewer images than dimensions do no harm.
    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
    """
    root1, root2 = (_factor(torch.from_numpy(sigma)) for sigma in (sigma1, sigma2))
    trace_of_root = torch.linalg.svdvals(root1.T @ root2).sum().item()
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def _factor(sigma: torch.Tensor) -> torch.Tensor:
    """L (D, r) with L L^T = sigma of rank r."""
    eigenvalues, eigenvectors = torch.linalg.eigh(sigma)  # (D,), (D, D)
    noise = eigenvalues[-1] * len(sigma) * torch.finfo(sigma.dtype).eps  # the threshold of a numerical rank
    kept = eigenvalues > noise
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()
