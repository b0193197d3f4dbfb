"""The index of a shard: read in place of all headers, and never for another shard."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images.shard_index import index_path, read_index
from data.images.shard_writer import ShardSample, write_shard
from data.images.tar_shards import TarShards, read_headers
from utils.errors import InputError


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Long and foreign names, which need headers of more than one block, and an image of whole blocks."""
    keys = ["n01/a", "n01/" + "ü" * 120, "n02/" + "b" * 200]
    samples = [ShardSample(key, i, ".png", png(i)) for i, key in enumerate(keys)]
    samples.append(ShardSample("n02/c", 3, ".jpeg", png(3) + bytes(1024 - len(png(3)))))
    write_shard(tmp_path / "a-000000.tar", samples)
    return tmp_path / "a-000000.tar"


def test_the_writer_records_what_the_headers_contain(shard: Path) -> None:
    found, expected = read_index(shard), read_headers(shard)
    for column in ("keys", "class_ids", "offsets", "sizes"):
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column))
        assert getattr(found, column).dtype == getattr(expected, column).dtype
    assert [found.sizes[3], found.class_ids.tolist()] == [1024, [0, 1, 2, 3]]


def test_with_an_index_no_header_is_read(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a shard was opened as a tar")

    monkeypatch.setattr(tarfile, "open", refuse)
    source = TarShards(str(shard))
    assert [source.read(i)[: len(png(i))] for i in range(4)] == [png(i) for i in range(4)]
    assert source.key(1) == "n01/" + "ü" * 120
    index_path(shard).unlink()
    with pytest.raises(AssertionError, match="opened as a tar"):
        TarShards(str(shard))


def test_an_index_of_another_shard_is_refused(shard: Path) -> None:
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(bytes(512))
    message = rf"{shard}: found {size + 512} bytes, expected {size} as in {index_path(shard)}; .*--index"
    with pytest.raises(InputError, match=message):
        TarShards(str(shard))
    index_path(shard).unlink()
    assert len(TarShards(str(shard))) == 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("class_ids", lambda values: values - 9),  # would be read as codes by the model
        ("class_ids", lambda values: values + 0.5),
        ("offsets", lambda values: values - 10**6),
        ("offsets", lambda values: values[:, None]),
        ("offsets", lambda values: values + 10**6),
        ("sizes", lambda values: -values),
        ("sizes", lambda values: values + 2**62),
        ("keys", lambda values: np.arange(len(values))),
    ],
)
def test_values_of_a_stranger(shard: Path, name: str, change: object) -> None:
    columns = dict(np.load(index_path(shard)))
    np.savez(index_path(shard), **columns | {name: change(columns[name])})
    with pytest.raises(InputError, match=rf"{index_path(shard)}: damaged .*--index"):
        TarShards(str(shard))


def flip(content: bytes) -> bytes:
    at = content.index(b"n01/a")
    return content[:at] + b"x" + content[at + 1 :]


@pytest.mark.parametrize("damage", [flip, lambda content: content[:200], lambda content: b"x" * 100, lambda _: b""])
def test_a_damaged_index_is_named(shard: Path, damage: object) -> None:
    index_path(shard).write_bytes(damage(index_path(shard).read_bytes()))
    with pytest.raises(InputError, match=rf"{index_path(shard)}: damaged .*--index") as error:
        TarShards(str(shard))
    assert "\n" not in str(error.value)
