"""k-means finds separate clusters, also among many equal points."""

import torch

from utils.kmeans import k_means


def test_clusters_are_found() -> None:
    clusters = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = clusters.repeat_interleave(50, dim=0) + torch.rand(150, 2, generator=torch.Generator().manual_seed(1))
    centres = k_means(points, 12, seed=0)
    assert torch.cdist(points, centres).min(dim=1).values.max() < 0.7
    assert torch.equal(centres, k_means(points, 12, seed=0))


def test_equal_points_do_not_hide_others() -> None:
    points = torch.cat([torch.zeros(10_000, 3), torch.eye(3)])
    centres = k_means(points, 4, seed=0)
    assert torch.cdist(points, centres).min(dim=1).values.max() < 1e-3


def test_fewer_points_than_centres() -> None:
    points = torch.eye(2)
    centres = k_means(points, 5, seed=0)
    assert centres.shape == (5, 2)
    assert torch.cdist(points, centres).min(dim=1).values.max() == 0
