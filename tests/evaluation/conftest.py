"""Shared fixtures: one process, the expected numbers of the original, made-up Inception weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.made_up import FIXTURES, inception_state
from utils.distributed import DistributedContext


@pytest.fixture(scope="session")
def alone() -> DistributedContext:
    return DistributedContext(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def expected() -> dict[str, np.ndarray]:
    """What the original evaluator gives for made-up weights and features (TensorFlow on CPU)."""
    with np.load(FIXTURES / "adm_expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "made_up_inception.pth"
    torch.save(inception_state(), path)
    return path
