"""Chunk files: what is missing, what is refused, what a failed write leaves."""

import errno
from pathlib import Path

import numpy as np
import pytest

from utils.errors import InputError
from utils.files.chunk_files import PROVENANCE_FILE, ChunkFiles
from utils.files.sample_chunks import SampleChunks

PROVENANCE = {"sampling.seed": 42, "sampling.compile": "auto"}


def images_of(chunk: range) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), i, np.uint8) for i in chunk])


@pytest.fixture
def chunk_files(tmp_path: Path) -> SampleChunks:
    chunk_files = SampleChunks(tmp_path / "x.chunks", num_images=10, chunk_size=4)
    chunk_files.open(PROVENANCE)
    return chunk_files


def test_chunks_cover_all_images(chunk_files: SampleChunks) -> None:
    assert chunk_files.chunks == [range(0, 4), range(4, 8), range(8, 10)]
    assert SampleChunks(chunk_files.folder, 3, 50).chunks == [range(3)]


def test_what_is_saved_is_not_missing(chunk_files: SampleChunks) -> None:
    chunk_files.save(range(4, 8), images_of(range(4, 8)))
    assert SampleChunks(chunk_files.folder, 10, 4).missing() == [range(0, 4), range(8, 10)]
    for chunk in chunk_files.missing():
        chunk_files.save(chunk, images_of(chunk))
    chunk_files.wait()
    np.testing.assert_array_equal(np.concatenate(list(chunk_files.load())), images_of(range(10)))
    np.testing.assert_array_equal(chunk_files.first_images(5), images_of(range(5)))
    np.testing.assert_array_equal(chunk_files.first_images(50), images_of(range(10)))


def test_a_write_that_fails_leaves_nothing(chunk_files: SampleChunks, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(file: object, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(np, "save", cut)
    with pytest.raises(OSError, match="disk full"):
        chunk_files.save(range(0, 4), images_of(range(0, 4)))
    assert [path.name for path in chunk_files.folder.iterdir()] == [PROVENANCE_FILE]


def test_chunks_of_another_provenance_are_refused_or_replaced(chunk_files: SampleChunks) -> None:
    chunk_files.save(range(0, 4), images_of(range(0, 4)))
    other = {**PROVENANCE, "sampling.seed": 1}
    with pytest.raises(InputError, match=r"x\.chunks: .*sampling\.seed: found 42, expected 1;"):
        chunk_files.open(other)
    with pytest.raises(InputError, match=r"sampling\.compile: found auto, expected None;"):
        chunk_files.open({"sampling.seed": 42})
    chunk_files.open(PROVENANCE)
    assert len(chunk_files.missing()) == 2
    chunk_files.open_or_replace(PROVENANCE)
    assert len(chunk_files.missing()) == 2
    chunk_files.open_or_replace(other)
    assert len(chunk_files.missing()) == 3


def test_chunks_without_a_provenance(chunk_files: SampleChunks) -> None:
    chunk_files.save(range(0, 4), images_of(range(0, 4)))
    (chunk_files.folder / PROVENANCE_FILE).unlink()
    assert not chunk_files.can_resume
    with pytest.raises(InputError, match=r"x\.chunks: .*provenance\.json"):
        chunk_files.open(PROVENANCE)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json"])
def test_damaged_chunks_of_every_kind_are_missing(tmp_path: Path, suffix: str) -> None:
    chunk_files = ChunkFiles(tmp_path / "x.chunks", num_items=5, chunk_size=1, suffix=suffix)
    chunk_files.open(PROVENANCE)
    for chunk in chunk_files.chunks:
        with chunk_files.writing(chunk) as partial, partial.open("wb") as file:
            if suffix == ".json":
                file.write(b'{"samples": 1}')
            elif suffix == ".npz":
                np.savez(file, codes=np.arange(99))
            else:
                np.save(file, np.arange(99))
    whole = chunk_files.path(chunk_files.chunks[0]).read_bytes()
    middle = len(whole) // 2
    for chunk, content in zip(
        chunk_files.chunks, (whole[:-1], b"", b"\xff" * len(whole), whole[:middle]), strict=False
    ):
        chunk_files.path(chunk).write_bytes(content)
    chunk_files.open(PROVENANCE)
    assert chunk_files.missing() == chunk_files.chunks[:4]


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"provenance": 1}'])
def test_a_damaged_provenance_is_one_line(chunk_files: SampleChunks, content: str) -> None:
    (chunk_files.folder / PROVENANCE_FILE).write_text(content)
    with pytest.raises(InputError, match=r"provenance\.json") as error:
        chunk_files.open(PROVENANCE)
    assert "\n" not in str(error.value)
