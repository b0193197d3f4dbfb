"""Kernel distance: torch-fidelity's number, unbiased, and in the order of the differences."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric

from evaluation import kernel_distance as module
from evaluation.kernel_distance import kernel_distance


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The definition, pair by pair: means of the kernel over different images of a set, and over pairs of both sets."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a: Tensor) -> Tensor:
        table = kernel(a, a)
        return (table.sum() - table.trace()) / (len(a) * (len(a) - 1))

    return (mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()).item()


def draw(seed: int, count: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) + shift


def test_it_is_the_number_of_torch_fidelity() -> None:
    reference, samples = draw(0, 2100), draw(1, 2000, shift=0.1)
    found = kernel_distance(reference, samples)
    wanted = kid_features_to_metric(
        reference, samples, kid_subsets=100, kid_subset_size=1000, kid_kernel_poly_degree=3, verbose=False
    )
    assert found.mean == wanted["kernel_inception_distance_mean"]
    assert found.std == wanted["kernel_inception_distance_std"]


def test_a_subset_has_the_value_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a set of 60 images, drawn as torch-fidelity draws."""
    monkeypatch.setattr(module, "SUBSETS", 1)
    x, y = draw(0, 60).double(), draw(1, 80, shift=0.5).double()
    random = np.random.RandomState(2020)  # torch-fidelity's seed
    rows = [random.choice(count, 30, replace=False) for count in (60, 80)]
    assert kernel_distance(x, y).mean == pytest.approx(squared_mmd(x[rows[0]], y[rows[1]]), rel=1e-12)


def test_it_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 400 pairs of small sets of one distribution the mean is 0, within three standard errors. The biased estimate
    adds the pairs of an image with itself, which is many standard errors."""
    monkeypatch.setattr(module, "SUBSETS", 1)
    values = np.array([kernel_distance(draw(2 * i, 40), draw(2 * i + 1, 40)).mean for i in range(400)])
    error = values.std() / 20
    assert abs(values.mean()) < 3 * error
    own_pairs = 2 * ((1 + 1) ** 3 - 1) / 20  # about (E k(x, x) - E k(x, y)) / n for each set
    assert own_pairs > 10 * error


def test_halves_of_the_same_data_are_near_0_and_noise_moves_away() -> None:
    data = draw(3, 1200)
    halves = kernel_distance(data[:600], data[600:])
    assert abs(halves.mean) < halves.std
    noise = draw(4, 600)
    distances = [kernel_distance(data[:600], data[600:] + size * noise).mean for size in (0.0, 0.5, 1.0, 2.0)]
    assert distances == sorted(distances)
    assert distances[2] > 3 * halves.std
