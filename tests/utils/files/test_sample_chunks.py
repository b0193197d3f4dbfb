import errno
from pathlib import Path

import numpy as np
import pytest

from utils.errors import InputError
from utils.files.chunk_files import FINGERPRINT
from utils.files.sample_chunks import SampleChunks

FINGERPRINT_A = {"sampling.seed": 42, "sampling.compile": "auto"}


def images_of(block: range) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), i, np.uint8) for i in block])


@pytest.fixture
def parts(tmp_path: Path) -> SampleChunks:
    parts = SampleChunks(tmp_path / "x.parts", num_images=10, block_size=4)
    parts.claim(FINGERPRINT_A)
    return parts


def test_blocks_cover_all_images(parts: SampleChunks) -> None:
    assert parts.blocks == [range(0, 4), range(4, 8), range(8, 10)]
    assert SampleChunks(parts.folder, 3, 50).blocks == [range(3)]


def test_what_is_saved_is_not_missing(parts: SampleChunks) -> None:
    parts.save(range(4, 8), images_of(range(4, 8)))
    assert SampleChunks(parts.folder, 10, 4).missing() == [range(0, 4), range(8, 10)]
    for block in parts.missing():
        parts.save(block, images_of(block))
    parts.wait()
    np.testing.assert_array_equal(np.concatenate(list(parts.load())), images_of(range(10)))
    np.testing.assert_array_equal(parts.first_images(5), images_of(range(5)))
    np.testing.assert_array_equal(parts.first_images(50), images_of(range(10)))


def test_a_write_that_fails_leaves_nothing(parts: SampleChunks, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(file: object, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(np, "save", cut)
    with pytest.raises(OSError, match="disk full"):
        parts.save(range(0, 4), images_of(range(0, 4)))
    assert [path.name for path in parts.folder.iterdir()] == [FINGERPRINT]


def test_another_origin_is_refused(parts: SampleChunks) -> None:
    with pytest.raises(InputError, match=r"fingerprint\.json: sampling\.seed=42 .* found 1; finish that run first"):
        parts.claim({**FINGERPRINT_A, "sampling.seed": 1})
    parts.claim(FINGERPRINT_A)  # the first claim stands
    with pytest.raises(InputError, match=r"sampling\.compile=auto in the run that began here, found None"):
        parts.check({"sampling.seed": 42})


def test_parts_without_a_fingerprint(parts: SampleChunks) -> None:
    parts.save(range(0, 4), images_of(range(0, 4)))
    (parts.folder / FINGERPRINT).unlink()
    with pytest.raises(InputError, match=r"holds parts but no fingerprint\.json"):
        parts.claim(FINGERPRINT_A)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_fingerprint_is_one_line(parts: SampleChunks, content: str) -> None:
    (parts.folder / FINGERPRINT).write_text(content)
    with pytest.raises(InputError, match=r"fingerprint\.json: (found no JSON|damaged)") as error:
        parts.claim(FINGERPRINT_A)
    assert "\n" not in str(error.value)
