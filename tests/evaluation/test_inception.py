"""Inception features against the original's, and weights files that must be refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.inception import CACHED_NAMES, Inception, find_cached_weights
from tests.evaluation.made_up import fixture_images
from utils.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception(inception_weights: Path) -> Inception:
    return Inception(CPU, inception_weights)


@pytest.mark.parametrize("edge", [64, 256])
def test_features_equal_the_original(inception: Inception, expected: dict[str, np.ndarray], edge: int) -> None:
    with torch.inference_mode():
        features = inception(torch.from_numpy(fixture_images(edge)))
    for found, name in ((features.pool, f"pool_{edge}"), (features.spatial, f"spatial_{edge}")):
        assert np.abs(found.numpy() - expected[name]).max() < 1e-5 * np.abs(expected[name]).max()
    assert features.log_probs.exp().sum(1).numpy() == pytest.approx(np.ones(4), rel=1e-12)


@pytest.mark.parametrize("edge", [8, 64, 500])
def test_resize_follows_tensorflow_1(inception: Inception, edge: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8)
    x = np.arange(299, dtype=np.float32) * np.float32(edge / 299)  # no half-pixel centres
    low = x.astype(int)
    high, t = np.minimum(low + 1, edge - 1), (x - low)[:, None]
    image_ = image.astype(np.float32)
    rows = image_[:, low] + (image_[:, high] - image_[:, low]) * t  # (edge, 299, 3), horizontally, then vertically
    wanted = rows[low] + (rows[high] - rows[low]) * t[:, None]
    inputs = []
    hook = inception.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    inception(torch.from_numpy(image[None]))
    hook.remove()
    np.testing.assert_allclose(inputs[0][0].permute(1, 2, 0).numpy(), (wanted - 128) / 128, atol=2e-6)


def test_weights_that_are_not_the_published_ones_are_told(inception: Inception) -> None:
    assert len(inception.weights_sha256) == 64
    assert "not the published" in inception.caveat
    inception.weights_sha256 = "6726825d" + "0" * 56
    assert inception.caveat is None


class Intruder:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("intruded"),)


def test_wrong_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_weights: Path) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.load(inception_weights, weights_only=True)
    torch.save({**state, "fc.weight": torch.full((1008, 2048), torch.nan)}, "nan.pth")
    torch.save({**state, "fc.weight": torch.ones(1008, 2048, dtype=torch.int8)}, "int8.pth")
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    torch.save([torch.zeros(3)], "list.pth")
    Path("text.pth").write_text("not weights")
    Path("empty.pth").touch()
    Path("cut.pth").write_bytes(inception_weights.read_bytes()[:1_000_000])
    Path("pickle.pth").write_bytes(pickle.dumps(Intruder(), protocol=2))
    for name, problem in {
        "missing.pth": "no such weights file",
        "nan.pth": r"1 of \d+ tensors hold NaN or infinity \(fc.weight\)",
        "int8.pth": r"1 of another type \(fc.weight int8 instead of float32\)",
        "other.pth": "not the weights of Inception 2015-12-05",
        "list.pth": "found a list",
        "text.pth": "begins with b'not weights'",
        "empty.pth": "found an empty file",
        "cut.pth": "refused: damaged, cut off",
        "pickle.pth": "refused: found",
    }.items():
        with pytest.raises(InputError, match=problem) as caught:
            Inception(CPU, Path(name))
        assert str(caught.value).startswith(f"{name}: ")
        assert "\n" not in str(caught.value)
    assert not Path("intruded").exists()


def test_weights_come_from_the_cache_but_never_from_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="holds neither"):
        find_cached_weights()
    cached = tmp_path / "checkpoints" / CACHED_NAMES[1]
    cached.parent.mkdir()
    cached.touch()
    assert find_cached_weights() == cached
