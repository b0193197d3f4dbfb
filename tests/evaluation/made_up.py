"""Inception weights by formula, images and a cheap back end. Weights and images are those of adm_expected.npz."""

import io
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.features import Features

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEED = 11


def random_state(name: str) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + SEED) % 2**32)


def softmax_weights() -> Tensor:
    """(2048, 1008), of the Inception Score."""
    weights = 0.2 * random_state("softmax/weights").standard_normal((2048, 1008))
    return torch.from_numpy(weights.astype(np.float32))


def blocky_images(random: np.random.RandomState, n: int, edge: int) -> np.ndarray:
    """uint8 (n, edge, edge, 3): 8x8 random colours with noise."""
    low = random.randint(0, 256, (n, 8, 8, 3)).astype(float)
    images = low.repeat(edge // 8, axis=1).repeat(edge // 8, axis=2)
    return np.clip(images + random.randint(-20, 21, images.shape), 0, 255).astype(np.uint8)


def fixture_images(edge: int) -> np.ndarray:
    """The four images (4, edge, edge, 3) of the fixture."""
    return blocky_images(np.random.RandomState(SEED + edge), 4, edge)


def fixture_features(n: int, seed: int, shift: float = 0, scale: float = 1) -> Tensor:
    """(n, 2048) float32, of the metric half of the fixture."""
    random = np.random.RandomState(seed)
    z = (scale * random.standard_normal((n, 48))).astype(np.float32) + np.float32(shift)
    mixing = (np.random.RandomState(7).standard_normal((48, 2048)) / np.sqrt(48)).astype(np.float32)
    features = np.maximum(z @ mixing * 0.40 + 0.2 + 0.12 * random.standard_normal((n, 2048)), 0)
    return torch.from_numpy(features.astype(np.float32))


def inception_state() -> dict[str, Tensor]:
    """The formula weights under torch-fidelity's keys."""
    shapes = inception_shapes()
    state = {"fc.weight": softmax_weights().T.contiguous(), "fc.bias": torch.zeros(1008)}
    for line in (FIXTURES / "inception_names.txt").read_text().splitlines():
        tf_name, _, module = line.partition(" -> ")
        if tf_name.endswith("/conv2d_params"):
            out, inner, height, width = shapes[f"{module}.weight"]
            hwio = random_state(tf_name).standard_normal((height, width, inner, out))
            hwio *= np.sqrt(2 / (height * width * inner))
            state[f"{module}.weight"] = torch.from_numpy(hwio.astype(np.float32)).permute(3, 2, 0, 1).contiguous()
        elif tf_name.endswith("/batchnorm"):
            (n,) = shapes[f"{module}.bias"]
            values = {
                "weight": np.ones(n),
                "bias": 0.2 * random_state(f"{tf_name}/beta").standard_normal(n),
                "running_mean": 0.2 * random_state(f"{tf_name}/moving_mean").standard_normal(n),
                "running_var": random_state(f"{tf_name}/moving_variance").uniform(0.7, 1.4, n),
            }
            state |= {f"{module}.{key}": torch.from_numpy(value.astype(np.float32)) for key, value in values.items()}
    return state


def inception_shapes() -> dict[str, torch.Size]:
    """Shapes by key of torch-fidelity's network, which cannot be built without weights: it loads none here."""
    from torch_fidelity import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Unloaded("inception", ["2048"], feature_extractor_weights_path=nothing)
    return {key: value.shape for key, value in network.state_dict().items()}


class StubExtractor:
    """A random projection of 8x8 pixels: every kind of feature, at next to no cost."""

    packages = ()
    weights_name, weights_sha256, caveat = "none", "none", None

    def __init__(self, pool_dim: int = 32, spatial_dim: int = 24, n_classes: int = 10) -> None:
        self.pool_dim, self.spatial_dim, self.n_classes = pool_dim, spatial_dim, n_classes
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.randn(192, pool_dim + spatial_dim, generator=generator) / 192**0.5
        self.classifier = torch.randn(pool_dim, n_classes, generator=generator, dtype=torch.float64) / pool_dim**0.5

    def __call__(self, images: Tensor) -> Features:
        x = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 128 - 1, 8).flatten(1)  # (B, 192)
        pool, spatial = (x @ self.projection).relu().split([self.pool_dim, self.spatial_dim], 1)
        return Features(pool, spatial, (8 * pool.double() @ self.classifier).log_softmax(1))
