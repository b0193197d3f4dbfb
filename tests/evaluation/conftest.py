"""Made-up Inception weights and images, as the fixtures in tests/fixtures/adm_expected.npz were made (seed 11)."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.distributed import Distributed

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEED = 11


def random_state(name: str) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + SEED) % 2**32)


def softmax_weights() -> torch.Tensor:
    """(2048, 1008), of the Inception Score."""
    weights = 0.2 * random_state("softmax/weights").standard_normal((2048, 1008))
    return torch.from_numpy(weights.astype(np.float32))


def made_up_images(edge: int) -> np.ndarray:
    """The four images (4, edge, edge, 3) of the fixture."""
    random = np.random.RandomState(SEED + edge)
    low = random.randint(0, 256, (4, 8, 8, 3)).astype(float)
    images = low.repeat(edge // 8, axis=1).repeat(edge // 8, axis=2)
    return np.clip(images + random.randint(-20, 21, images.shape), 0, 255).astype(np.uint8)


def inception_state(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The formula weights under torch-fidelity's keys."""
    state = {"fc.weight": softmax_weights().T.contiguous(), "fc.bias": torch.zeros(1008)}
    for line in (FIXTURES / "inception_names.txt").read_text().splitlines():
        tf_name, separator, module = line.partition(" -> ")
        if not separator or line.startswith("#"):
            continue
        if tf_name.endswith("/conv2d_params"):
            out, inner, height, width = shapes[f"{module}.weight"]
            hwio = random_state(tf_name).standard_normal((height, width, inner, out))
            hwio *= np.sqrt(2 / (height * width * inner))
            state[f"{module}.weight"] = torch.from_numpy(hwio.astype(np.float32)).permute(3, 2, 0, 1).contiguous()
        elif tf_name.endswith("/batchnorm"):
            n = shapes[f"{module}.bias"][0]
            values = {
                "weight": np.ones(n),
                "bias": 0.2 * random_state(f"{tf_name}/beta").standard_normal(n),
                "running_mean": 0.2 * random_state(f"{tf_name}/moving_mean").standard_normal(n),
                "running_var": random_state(f"{tf_name}/moving_variance").uniform(0.7, 1.4, n),
            }
            state |= {f"{module}.{key}": torch.from_numpy(value.astype(np.float32)) for key, value in values.items()}
    return state
