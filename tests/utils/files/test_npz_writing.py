from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from utils.files.npz import write_npz


def chunked(array: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def write(path: Path, images: np.ndarray, rows: int) -> None:
    labels = np.arange(len(images))
    write_npz(
        path,
        {
            "arr_0": (images.shape, np.uint8, chunked(images, rows)),
            "arr_1": (labels.shape, np.int64, [labels]),
        },
    )


def test_numpy_reads_it(tmp_path: Path, images: np.ndarray) -> None:
    write(tmp_path / "a.npz", images, 3)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(7))


def test_bytes_depend_on_the_arrays_only(tmp_path: Path, images: np.ndarray) -> None:
    write(tmp_path / "a.npz", images, 3)
    write(tmp_path / "b.npz", images, 7)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_rows_that_are_not_contiguous(tmp_path: Path, images: np.ndarray) -> None:
    write(tmp_path / "a.npz", images[:, ::-1], 2)
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images[:, ::-1])


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((8, 5, 4, 3), np.uint8, r"arr_0: found 7 rows, expected 8"),
        ((7, 5, 4, 3), np.int64, r"arr_0: found a chunk of uint8 .*, expected int64"),
        ((7, 5, 3, 3), np.uint8, r"expected uint8 \(rows, \*\(5, 3, 3\)\)"),
    ],
)
def test_wrong_chunks_leave_nothing_behind(
    tmp_path: Path, images: np.ndarray, shape: tuple[int, ...], dtype: type, message: str
) -> None:
    (tmp_path / "a.npz").write_bytes(b"from an earlier run")
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "a.npz", {"arr_0": (shape, dtype, [images])})
    assert (tmp_path / "a.npz").read_bytes() == b"from an earlier run"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_name_is_taken_only_when_complete(tmp_path: Path, images: np.ndarray) -> None:
    def chunks() -> Iterator[np.ndarray]:
        assert [path.name for path in tmp_path.iterdir()] == ["a.npz.tmp"]
        yield images

    write_npz(tmp_path / "a.npz", {"arr_0": (images.shape, np.uint8, chunks())})
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
