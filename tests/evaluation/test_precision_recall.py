"""Precision and recall against the original's numbers, and against the definition."""

import numpy as np
import pytest
import torch

from evaluation import precision_recall as module
from evaluation.precision_recall import manifold_radii, precision_recall
from tests.evaluation.made_up import fixture_features
from utils.distributed import DistributedContext
from utils.errors import InputError

ONE_SAMPLE, ONE_REFERENCE = 1 / 5200, 1 / 2400


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor]:
    return fixture_features(2400, 12), fixture_features(5200, 13, 0.03, 0.9)


def test_float16_equals_the_original(
    features: tuple[torch.Tensor, torch.Tensor], expected: dict[str, np.ndarray], alone: DistributedContext
) -> None:
    reference, samples = (x.half() for x in features)
    precision, recall = precision_recall(reference, samples, alone)
    assert abs(precision - expected["precision"]) <= ONE_SAMPLE
    assert abs(recall - expected["recall"]) <= ONE_REFERENCE
    for rows, radii in ((reference, expected["radii_ref"]), (samples, expected["radii_sample"])):
        assert (manifold_radii(rows, alone).numpy() == radii).mean() >= 0.99


def test_float32_is_lower_than_the_original(
    features: tuple[torch.Tensor, torch.Tensor], expected: dict[str, np.ndarray], alone: DistributedContext
) -> None:
    precision, recall = precision_recall(*features, alone)
    assert -0.003 < precision - expected["precision"] < -ONE_SAMPLE
    assert -0.004 < recall - expected["recall"] < -ONE_REFERENCE


def test_float32_equals_the_definition_for_any_block_size(
    monkeypatch: pytest.MonkeyPatch, alone: DistributedContext
) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, samples = (torch.randn(n, 6, generator=generator) for n in (41, 60))
    radii = [torch.cdist(x, x).square().sort(1).values[:, 3] for x in (reference, samples)]
    distances = torch.cdist(reference, samples).square()
    precision = (distances <= radii[0][:, None]).any(0).double().mean().item()
    recall = (distances <= radii[1]).any(1).double().mean().item()
    assert 0.1 < precision < 0.99
    for rows, columns in ((500, 10_000), (7, 20), (3, 59)):
        monkeypatch.setattr(module, "BLOCK_ROWS", rows)
        monkeypatch.setattr(module, "BLOCK_COLUMNS", columns)
        assert precision_recall(reference, samples, alone) == (precision, recall)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_identical_sets_cover_each_other(dtype: torch.dtype, alone: DistributedContext) -> None:
    features = fixture_features(60, 1).to(dtype)
    assert precision_recall(features, features, alone) == (1, 1)


def test_features_too_large_for_float16_are_refused(alone: DistributedContext) -> None:
    features = 5 * torch.ones(10, 2048).half()
    with pytest.raises(InputError, match=r"overflow float16; use --distance fp32"):
        precision_recall(features, features, alone)
    assert precision_recall(features.float(), features.float(), alone) == (1, 1)
