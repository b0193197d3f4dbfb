"""The index of a tar shard, `<shard>.index.npz` next to `<shard>.tar`: where each image is, so that no start reads all
headers. It holds the columns of `ShardIndex`, the size of the shard in bytes and, if recorded, its sha256.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.images.image_source import to_bytes
from utils.errors import InputError
from utils.files.npz import write_npz

COLUMNS = ("keys", "class_ids", "offsets", "sizes")


@dataclass
class ShardIndex:
    """Columns with a row per sample. Arrays, as workers would copy the memory of a list when they read it."""

    keys: np.ndarray  # (n,) bytes
    class_ids: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (n,) int64, of the image, in bytes from the start of the shard
    sizes: np.ndarray  # (n,) int64, of the image, in bytes
    sha256: str = ""  # of the shard; empty: unknown
    labels: list[str] | None = None  # names of the class ids, which count for this shard only; None: numbers are global

    @classmethod
    def of(cls, samples: list[tuple[str, int, int, int]]) -> "ShardIndex":
        """The index of samples given as (key, class id, offset, size)."""
        keys, class_ids, offsets, sizes = zip(*samples, strict=True)
        return cls(
            keys=np.array([to_bytes(key) for key in keys]),
            class_ids=np.array(class_ids, dtype=np.int32),
            offsets=np.array(offsets),
            sizes=np.array(sizes),
        )

    def __len__(self) -> int:
        return len(self.keys)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npz")


def write_index(shard: Path, index: ShardIndex, shard_bytes: int) -> None:
    columns = {name: getattr(index, name) for name in COLUMNS}
    columns["shard_bytes"] = np.array([shard_bytes])
    columns["shard_sha256"] = np.array([index.sha256.encode()], dtype="S64")
    if index.labels is not None:
        columns["labels"] = np.array([label.encode() for label in index.labels])
    write_npz(index_path(shard), {name: (column.shape, column.dtype, [column]) for name, column in columns.items()})


def read_index(shard: Path) -> ShardIndex | None:
    """None if there is none; raises InputError if it is damaged or belongs to a shard of a different size."""
    path = index_path(shard)
    if not path.is_file():
        return None
    index, expected = load_index(path)
    found = shard.stat().st_size
    if found != expected:
        raise InputError(
            f"{shard}: found {found} bytes, expected {expected} as in {path}; restore the shard or rewrite the index: "
            "make_shards.py --index"
        )
    return index


def load_index(path: Path) -> tuple[ShardIndex, int]:
    """The index in a file, and the size of its shard in bytes; raises InputError if it is damaged."""
    try:
        with np.load(path) as columns:
            sha256 = columns["shard_sha256"][0].decode()
            labels = [label.decode() for label in columns["labels"]] if "labels" in columns else None
            index = ShardIndex(**{name: columns[name] for name in COLUMNS}, sha256=sha256, labels=labels)
            expected = int(columns["shard_bytes"][0])
        if not len(index.keys) == len(index.class_ids) == len(index.offsets) == len(index.sizes) > 0:
            raise ValueError("columns of different lengths, or empty")
        _check_values(index, expected)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); delete it or rewrite it: make_shards.py --index") from error
    return index, expected


def _check_values(index: ShardIndex, shard_bytes: int) -> None:
    """Raise ValueError for values that no writer of ours gives: the file may be from someone else."""
    for name in COLUMNS:
        column = getattr(index, name)
        if column.ndim != 1 or column.dtype.kind != ("S" if name == "keys" else "i"):
            raise ValueError(f"{name} of type {column.dtype} and shape {column.shape}")
    if index.labels is not None and index.class_ids.max() >= len(index.labels):
        raise ValueError("class ids without a label")
    numbers = (index.class_ids, index.offsets, index.sizes)
    if min(column.min() for column in numbers) < 0 or (index.sizes > shard_bytes - index.offsets).any():
        raise ValueError("negative values, or images beyond the end of the shard")
