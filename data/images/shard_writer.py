"""Webdataset shards: the images untouched, the bytes of the shards reproducible, an index beside each.

Our own, for webdataset's writer does not tell the offsets, and it writes the names of the user into the headers.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.images.image_folder import ImageFolder
from data.images.shard_index import ShardIndex, write_index
from data.images.tar_shards import CLASS_NAMES_FILE, COUNTS_FILE, read_headers
from utils.errors import InputError
from utils.faults import fault_point
from utils.files.atomic import atomic_file, publish, write_text
from utils.files.chunk_files import ChunkFiles
from utils.files.hashing import file_sha256
from utils.processes import in_processes
from utils.randomness import Stream, permutation, philox

FILE_MODE = 0o444
HELDOUT_PREFIX = "heldout"


class ShardSample(NamedTuple):
    key: str
    class_id: int
    extension: str  # with its dot
    encoded: bytes  # the image


class Shard(NamedTuple):
    name: str
    indices: np.ndarray  # of its images in the source


def plan_shards(source: ImageFolder, prefix: str, samples_per_shard: int, heldout: float) -> list[Shard]:
    """Shuffled, so that every shard holds all classes.

    Args:
        heldout: share of each class, rounded down but at least one image, that goes to the shards `heldout-*.tar`.

    Raises:
        InputError: a class of one image, none of which can be held out.
    """
    order = permutation(philox(Stream.SHARDS, 0, 0), len(source))
    by_class = order[np.argsort(source.class_ids[order], kind="stable")]  # grouped, shuffled within a class
    counts = np.bincount(source.class_ids)
    rank = np.empty(len(source), dtype=np.int64)  # within the class
    rank[by_class] = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    num_heldout = np.maximum((heldout * counts).astype(np.int64), 1 if heldout > 0 else 0)
    if (num_heldout == counts).any():
        small = int((num_heldout == counts).argmax())
        raise InputError(
            f"{source.root}: found 1 image of class {source.class_names[small]!r}, expected at least 2, to hold one "
            "out; add images or leave out --heldout"
        )
    is_heldout = rank < num_heldout[source.class_ids]
    shards = []
    for name, indices in ((prefix, order[~is_heldout[order]]), (HELDOUT_PREFIX, order[is_heldout[order]])):
        cuts = range(0, len(indices), samples_per_shard)
        shards += [Shard(f"{name}-{i:06d}.tar", indices[cut : cut + samples_per_shard]) for i, cut in enumerate(cuts)]
    return shards


def is_written(output: Path, class_names: list[str], shards: list[Shard]) -> bool:
    """Whether these shards are there already; then what a kill at the very end has left is deleted.

    Raises:
        InputError: something else is there.
    """
    if not output.exists():
        return False
    try:
        found = {name: record["samples"] for name, record in json.loads((output / COUNTS_FILE).read_text()).items()}
        same = found == {shard.name: len(shard.indices) for shard in shards}
        same = same and json.loads((output / CLASS_NAMES_FILE).read_text()) == class_names
    except (OSError, ValueError, TypeError):
        same = False
    if not same:
        raise InputError(f"{output}: exists and holds other things; delete it or choose another name")
    shutil.rmtree(parts_folder(output), ignore_errors=True)
    return True


def parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def write_shards(
    source: ImageFolder, class_names: list[str], shards: list[Shard], output: Path, processes: int
) -> Generator[int, None, None]:
    """Write them, their indices, shards.json and classes.json to a folder that appears when all is done; yields numbers
    of images.

    Until then the shards lie in `<output>.parts/`, from where the next call goes on.

    Raises:
        InputError: a file that cannot be read, or parts of another source.
    """
    parts = ChunkFiles(parts_folder(output), len(shards), 1, ".json")
    fingerprint: dict[str, Any] = {"images": source.fingerprint, "class names": class_names}
    fingerprint |= {shard.name: len(shard.indices) for shard in shards}
    parts.claim(fingerprint)
    folder = parts.folder / "shards"
    folder.mkdir(exist_ok=True)
    keys = unique_keys(source)

    def write(block: range) -> None:
        shard = shards[block.start]
        with parts.writing(block) as record:
            record.write_text(json.dumps(write_shard(folder / shard.name, _samples(source, shard.indices, keys))))

    missing = parts.missing()
    yield sum(len(shard.indices) for shard in shards) - sum(len(shards[block.start].indices) for block in missing)
    for block in in_processes(write, missing, processes):
        yield len(shards[block.start].indices)
    fault_point("join.begin", 0)
    records = {shards[block.start].name: json.loads(parts.path(block).read_text()) for block in parts.blocks}
    write_text(folder / COUNTS_FILE, json.dumps(records, indent=1) + "\n")
    write_text(folder / CLASS_NAMES_FILE, json.dumps(class_names) + "\n")
    fault_point("join.end", 0)
    publish(folder, output)
    parts.remove()


def unique_keys(source: ImageFolder) -> list[str]:
    """`<class folder>/<file name>` without extension; webdataset ends a key at the first dot.

    Raises:
        InputError: two files with the same key.
    """
    keys: dict[str, int] = {}
    for index in range(len(source)):
        folder, _, name = source.key(index).rpartition("/")
        key = f"{folder}/{Path(name).stem.replace('.', '_')}"
        if key in keys:
            raise InputError(f"{source.location(index)}: has the same key {key!r} as {source.location(keys[key])}")
        keys[key] = index
    return list(keys)


def _samples(source: ImageFolder, indices: np.ndarray, keys: list[str]) -> Iterator[ShardSample]:
    for index in indices.tolist():
        encoded = source.read(index)
        if not encoded:
            raise InputError(f"{source.location(index)}: found an empty file, expected an image")
        yield ShardSample(keys[index], int(source.class_ids[index]), Path(source.key(index)).suffix.lower(), encoded)


def write_shard(path: Path, samples: Iterable[ShardSample]) -> dict[str, Any]:
    """Per sample `<key>.cls` and `<key>.<extension>`, in order, without times and owners; then the index beside it.

    Returns:
        samples, bytes and sha256 of the shard, as in shards.json.
    """
    rows = []
    with (
        atomic_file(path) as partial,
        tarfile.open(partial, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for key, class_id, extension, encoded in samples:
            for suffix, content in ((".cls", str(class_id).encode()), (extension, encoded)):
                member = tarfile.TarInfo(key + suffix)
                member.size, member.mode = len(content), FILE_MODE
                tar.addfile(member, io.BytesIO(content))
            end = tar.offset  # of the image, which fills whole blocks
            rows.append((key, class_id, end - -(-len(encoded) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, len(encoded)))
    index = ShardIndex.of(rows)
    index.sha256 = file_sha256(path)
    write_index(path, index)
    return {"samples": len(index), "bytes": path.stat().st_size, "sha256": index.sha256}


def index_shards(shards: list[Path], processes: int) -> Iterator[Path]:
    """Write the indices of shards from elsewhere, whose headers are read for it; yields the shards that are done.

    Raises:
        InputError: a damaged shard.
    """
    blocks = [range(i, i + 1) for i in range(len(shards))]
    for block in in_processes(lambda b: write_index(shards[b.start], read_headers(shards[b.start])), blocks, processes):
        yield shards[block.start]
