"""Frechet distance, moments and Inception Score against closed forms and the original's numbers."""

import numpy as np
import pytest
import torch

from evaluation.metrics import SPLIT_SIZE, Gaussian, Moments, ScoreSums, frechet_distance
from tests.evaluation.made_up import fixture_features, softmax_weights

CPU = torch.device("cpu")


def gaussian_of(features: torch.Tensor, batch_size: int = 64) -> Gaussian:
    moments = Moments(features.shape[1], CPU)
    for batch in features.split(batch_size):
        moments.update(batch)
    return moments.gaussian()


def score_of(log_probs: torch.Tensor, batch_size: int = 64) -> float:
    sums = ScoreSums(len(log_probs), log_probs.shape[1], CPU)
    for start in range(0, len(log_probs), batch_size):
        sums.update(start, log_probs[start : start + batch_size])
    return sums.inception_score()


def test_frechet_distance_and_score_equal_the_original(expected: dict[str, np.ndarray]) -> None:
    reference, samples = fixture_features(2400, 12), fixture_features(5200, 13, 0.03, 0.9)
    fid = frechet_distance(gaussian_of(reference), gaussian_of(samples))
    assert fid == pytest.approx(expected["fid"], rel=1e-6)
    log_probs = (samples.double() @ softmax_weights().double()).log_softmax(1)
    assert score_of(log_probs) == pytest.approx(expected["inception_score"], rel=2e-6)


@pytest.mark.parametrize("zeros", [0, 20])
def test_frechet_distance_of_commuting_covariances(zeros: int) -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    a, b = rng.uniform(0.1, 3, (2, 60))
    a[:zeros] = b[zeros // 2 : zeros + zeros // 2] = 0  # rank deficient, in different directions
    mu1, mu2 = rng.standard_normal((2, 60))
    distance = frechet_distance(Gaussian(mu1, (basis * a) @ basis.T), Gaussian(mu2, (basis * b) @ basis.T))
    assert distance == pytest.approx(((mu1 - mu2) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-12)


def test_frechet_distance_survives_reordering_with_fewer_images_than_features() -> None:
    rng = np.random.default_rng(0)
    reference, samples = (torch.from_numpy(rng.random((n, 200))) for n in (80, 60))
    shuffled = samples[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    expected = frechet_distance(gaussian_of(reference), gaussian_of(samples))
    assert frechet_distance(gaussian_of(reference), gaussian_of(shuffled, 7)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(gaussian_of(reference), gaussian_of(reference)) == pytest.approx(0, abs=1e-11)


def test_moments_equal_numpys() -> None:
    features = np.random.default_rng(0).random((1000, 30)) + 5
    gaussian = gaussian_of(torch.from_numpy(features), 33)
    np.testing.assert_allclose(gaussian.mu, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.sigma, np.cov(features, rowvar=False), atol=1e-12)


def test_one_hot_rows_score_the_number_of_classes() -> None:
    logits = 1e4 * torch.eye(10, dtype=torch.float64).repeat(20, 1)
    assert score_of(logits.log_softmax(1)) == pytest.approx(10, rel=1e-12)
    assert score_of(torch.zeros(50, 10, dtype=torch.float64).log_softmax(1)) == pytest.approx(1, rel=1e-12)


def test_score_is_the_mean_over_splits_in_file_order() -> None:
    logits = torch.randn(SPLIT_SIZE + 777, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    log_probs = logits.log_softmax(1)
    alone = [score_of(part) for part in log_probs.split(SPLIT_SIZE)]
    assert score_of(log_probs, 1000) == pytest.approx(np.mean(alone), rel=1e-12)
    by_class = log_probs[logits.argmax(1).argsort()]
    assert score_of(by_class) < score_of(log_probs) - 0.1
