"""Input files: the arrays of good ones, and one line for each kind of bad one."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.inputs import STATISTICS, open_input
from utils.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def statistics() -> dict[str, np.ndarray]:
    return {key: np.zeros(shape, np.float32) for key, shape in STATISTICS.items()}


def test_rows_are_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=IMAGES, arr_1=np.arange(5))
    opened = open_input(path, verify=True)
    assert len(opened.images) == 5
    assert opened.statistics is None
    np.testing.assert_array_equal(opened.images.read(1, 4), IMAGES[1:4])
    np.testing.assert_array_equal(opened.images.read(0, 5), IMAGES)


def test_stored_statistics_are_read(tmp_path: Path, statistics: dict[str, np.ndarray]) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **(statistics | {"mu": np.arange(2048, dtype=np.float32)}), arr_0=IMAGES)
    opened = open_input(path, verify=False)
    assert opened.sha256 is None
    assert opened.statistics["mu"].dtype == np.float64
    np.testing.assert_array_equal(opened.statistics["mu"], np.arange(2048))
    np.testing.assert_array_equal(opened.images.read(0, 5), IMAGES)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"arr_1": IMAGES}, "arr_0 is missing, found arr_1"),
        ({"arr_0": IMAGES.astype(np.float32)}, "arr_0 has dtype float32, expected uint8"),
        ({"arr_0": IMAGES.astype(np.int64)}, "arr_0 has dtype int64, expected uint8"),
        ({"arr_0": np.array([None])}, "arr_0 has dtype object, expected uint8"),
        ({"arr_0": IMAGES[0]}, r"arr_0 has shape \(6, 7, 3\), expected"),
        ({"arr_0": IMAGES[..., :1]}, r"arr_0 has shape \(5, 6, 7, 1\), expected"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, r"arr_0 has shape \(5, 3, 6, 7\), expected"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "in Fortran order, expected"),
        ({"arr_0": IMAGES[:, :0]}, r"arr_0 has shape \(5, 0, 7, 3\), expected"),
        ({"arr_0": IMAGES[:3]}, "arr_0 holds 3 images, expected at least 4"),
        ({"arr_0": IMAGES, "mu": np.zeros(2048)}, "sigma is missing, expected all of mu, sigma, mu_s, sigma_s or none"),
    ],
)
def test_wrong_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], problem: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    assert_refused(path, problem)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("mu", np.full(2048, np.nan), r"mu is float64 of shape \(2048,\), expected finite"),
        (
            "sigma",
            np.zeros((2048, 3)),
            r"sigma is float64 of shape \(2048, 3\), expected finite floats of shape \(2048, 2048\)",
        ),
        ("mu_s", np.zeros(2023, np.int32), "mu_s is int32"),
        ("mu_s", np.array(["x"], object), "mu_s is not readable"),
    ],
)
def test_wrong_statistics(
    tmp_path: Path, statistics: dict[str, np.ndarray], key: str, value: np.ndarray, problem: str
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **(statistics | {key: value}), arr_0=IMAGES)
    assert_refused(path, problem)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_pixel(data: bytes) -> bytes:
    at = data.index(IMAGES[2].tobytes())
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, "damaged or not an npz file"),
        (flip_a_pixel, "damaged or not an npz file .*CRC"),
        (lambda data: b"", "damaged or not an npz file"),
        (lambda data: b"hello", "damaged or not an npz file"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[bytes], bytes], problem: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=IMAGES)
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(path, problem)


def test_other_files(tmp_path: Path) -> None:
    assert_refused(tmp_path / "x.npz", "no such file")
    assert_refused(tmp_path, r"found a folder, expected an npz of images; pack the images with numpy\.savez")
    compressed, no_header, short = (tmp_path / f"{name}.npz" for name in ("compressed", "no_header", "short"))
    np.savez_compressed(compressed, arr_0=IMAGES)
    assert_refused(compressed, "arr_0 is compressed, expected an npz of numpy.savez")
    with zipfile.ZipFile(no_header, "w") as archive:
        archive.writestr("arr_0.npy", b"no npy header")
    assert_refused(no_header, "arr_0 has no readable npy header")
    np.save(tmp_path / "x.npy", IMAGES)
    with zipfile.ZipFile(short, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "x.npy").read_bytes()[:-1])
    assert_refused(short, "arr_0 has 629 bytes, expected 630")


def assert_refused(path: Path, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        open_input(path, verify=True)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
