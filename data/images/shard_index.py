"""What is where in a tar shard: `<shard>.index.npz` beside `<shard>.tar`, so that no start reads all headers.

One file per shard, for shards are written, copied and chosen one by one. It holds the columns of `ShardIndex`, the size
of the shard in bytes and, if its writer knew it, the sha256.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.images.image_source import to_bytes
from utils.errors import InputError
from utils.files.npz import write_npz


@dataclass
class ShardIndex:
    """Columns, a row per sample; arrays, for reference counts would make every worker copy the memory."""

    keys: np.ndarray  # (n,) bytes
    class_ids: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (n,) int64, of the image, in bytes from the start of the shard
    sizes: np.ndarray  # (n,) int64, of the image, in bytes
    sha256: str = ""  # of the shard; empty: not known

    @classmethod
    def of(cls, samples: list[tuple[str, int, int, int]]) -> "ShardIndex":
        """From key, class id, offset and size of each sample."""
        keys, *numbers = zip(*samples, strict=True)
        class_ids, offsets, sizes = map(np.array, numbers)
        return cls(np.array(list(map(to_bytes, keys))), class_ids.astype(np.int32), offsets, sizes)

    def __len__(self) -> int:
        return len(self.keys)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npz")


def write_index(shard: Path, index: ShardIndex) -> None:
    columns = {"keys": index.keys, "class_ids": index.class_ids, "offsets": index.offsets, "sizes": index.sizes}
    columns["shard_bytes"] = np.array([shard.stat().st_size])
    columns["shard_sha256"] = np.array([index.sha256.encode()], dtype="S64")
    write_npz(index_path(shard), {name: (column.shape, column.dtype, [column]) for name, column in columns.items()})


def read_index(shard: Path) -> ShardIndex | None:
    """None if the shard has no index.

    Raises:
        InputError: the index is damaged, or of a shard of another size.
    """
    path = index_path(shard)
    if not path.is_file():
        return None
    try:
        with np.load(path) as columns:
            index = ShardIndex(*(columns[name] for name in ("keys", "class_ids", "offsets", "sizes")))
            index.sha256, expected = columns["shard_sha256"][0].decode(), int(columns["shard_bytes"][0])
        if not len(index.keys) == len(index.class_ids) == len(index.offsets) == len(index.sizes) > 0:
            raise ValueError("columns of different lengths, or empty")
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); delete it or write it anew: make_shards.py --index") from error
    found = shard.stat().st_size
    if found != expected:
        raise InputError(
            f"{shard}: found {found} bytes, expected {expected} as in {path}; one of the two was replaced: "
            "restore the shard or write the index anew: make_shards.py --index"
        )
    return index
