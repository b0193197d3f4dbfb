"""k-means, by SciPy."""

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

MAX_POINTS = 40_000  # more change the centres little and take long
ITERATIONS = 15


def k_means(points: Tensor, num_centres: int, seed: int) -> Tensor:
    """Centres (num_centres, D) float32, on the device of the points (M, D), of at most `MAX_POINTS` of them.

    Starts from distinct points: images with few colours have many equal patches. Centres without points stay where they
    started. (SciPy's k-means++ needs a minute for 512 centres.)
    """
    generator = torch.Generator().manual_seed(seed)
    flat = points.detach().cpu().float()
    chosen = flat[torch.randperm(len(flat), generator=generator)[:MAX_POINTS]]
    distinct = chosen.unique(dim=0)
    starts = distinct[torch.randperm(len(distinct), generator=generator)].numpy()
    starts = np.resize(starts, (num_centres, starts.shape[1]))  # cut, or repeated if there are fewer
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centres, _ = kmeans2(chosen.numpy(), starts, iter=ITERATIONS, minit="matrix")
    return torch.from_numpy(centres).to(points.device)
