"""Webdataset shards with unchanged images, reproducible bytes and an index for each.

Not webdataset's own writer: it does not report offsets and writes the user's name into the headers.
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
from data.images.shard_index import ShardIndex, index_path, write_index
from data.images.tar_shards import CLASS_NAMES_FILE, COUNTS_FILE, read_headers
from utils.errors import InputError
from utils.faults import fault_point
from utils.files.atomic import atomic_file, publish, write_text
from utils.files.chunk_files import PROVENANCE_FILE, ChunkFiles
from utils.files.hashing import file_sha256
from utils.files.json_file import read_json
from utils.files.provenance import is_made, write_record
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
    """Shuffle the images, so that every shard holds all classes, and cut them into shards.

    `heldout` is the share of each class, rounded down but at least one image, for the shards `heldout-*.tar`. Raises
    InputError for a class of one image, which cannot be divided.
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
        starts = range(0, len(indices), samples_per_shard)
        for number, start in enumerate(starts):
            shards.append(Shard(f"{name}-{number:06d}.tar", indices[start : start + samples_per_shard]))
    return shards


def provenance_of(source: ImageFolder, class_names: list[str], shards: list[Shard]) -> dict[str, Any]:
    """Everything that the shards depend on, with sizes and times of the images instead of their content."""
    return {
        "names of the images": source.fingerprint,
        "sizes and times of the images": source.files_fingerprint,
        "class names": class_names,
        **{shard.name: len(shard.indices) for shard in shards},
    }


def is_written(output: Path, provenance: dict[str, Any]) -> bool:
    """Whether `output` holds the shards of this provenance, by their sizes; if so, leftovers of a run killed at its
    very end are deleted. Raises InputError if it holds something else."""
    if not is_made(output, provenance, output / PROVENANCE_FILE):
        return False
    shutil.rmtree(chunk_folder(output), ignore_errors=True)
    return True


def chunk_folder(output: Path) -> Path:
    return output.with_name(output.name + ".chunks")


def write_shards(
    source: ImageFolder, provenance: dict[str, Any], shards: list[Shard], output: Path, processes: int
) -> Generator[int, None, None]:
    """Write the shards, their indices, shards.json, classes.json and provenance.json to the folder `output`,
    atomically; yields numbers of images. Finished shards are in `<output>.chunks/` meanwhile, from which the next call
    resumes.

    Raises InputError for a file that cannot be read, or shards of a different source in that folder.
    """
    chunk_files = ChunkFiles(chunk_folder(output), num_items=len(shards), chunk_size=1, suffix=".json")
    chunk_files.open(provenance)
    folder = chunk_files.folder / "shards"
    folder.mkdir(exist_ok=True)
    _delete_records_of_damaged_shards(chunk_files, shards, folder)
    keys = unique_keys(source)

    def write(chunk: range) -> None:
        shard = shards[chunk.start]
        with chunk_files.writing(chunk) as record:
            content = json.dumps(write_shard(folder / shard.name, _samples(source, shard.indices, keys)))
            record.write_text(content, encoding="utf-8")

    missing = chunk_files.missing()
    yield len(source) - sum(len(shards[chunk.start].indices) for chunk in missing)
    for chunk in in_processes(write, missing, processes):
        yield len(shards[chunk.start].indices)
    fault_point("join.begin", 0)
    records = {shards[chunk.start].name: read_json(chunk_files.path(chunk)) for chunk in chunk_files.chunks}
    write_text(folder / COUNTS_FILE, json.dumps(records, indent=1) + "\n")
    write_text(folder / CLASS_NAMES_FILE, json.dumps(provenance["class names"]) + "\n")
    files = [path for path in sorted(folder.iterdir()) if path.name != PROVENANCE_FILE]
    sizes = {path.name: {"bytes": path.stat().st_size} for path in files}  # hashing would take long
    write_record(output, provenance, folder / PROVENANCE_FILE, figures={"files": sizes})
    fault_point("join.end", 0)
    publish(folder, output)
    chunk_files.remove()


def _delete_records_of_damaged_shards(chunk_files: ChunkFiles, shards: list[Shard], folder: Path) -> None:
    """A shard that lacks its index, or has not the recorded size, is written again."""
    for chunk in chunk_files.chunks:
        record, shard = chunk_files.path(chunk), folder / shards[chunk.start].name
        if not record.exists():
            continue
        size = shard.stat().st_size if shard.is_file() else None
        if size != read_json(record)["bytes"] or not index_path(shard).is_file():
            record.unlink()


def unique_keys(source: ImageFolder) -> list[str]:
    """`<class folder>/<file name>` of each image, without extension and with dots replaced, since webdataset ends a key
    at a dot; raises InputError for two files with the same key."""
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
    """Write `<key>.cls` and `<key>.<extension>` of each sample, in order, without times and owners; then the index.
    Returns samples, bytes and sha256 of the shard, as in shards.json."""
    rows = []
    with (
        atomic_file(path) as partial,
        tarfile.open(partial, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar,
    ):
        for key, class_id, extension, encoded in samples:
            for suffix, content in ((".cls", str(class_id).encode()), (extension, encoded)):
                member = tarfile.TarInfo(key + suffix)
                member.size, member.mode = len(content), FILE_MODE
                tar.addfile(member, io.BytesIO(content))
            num_blocks = -(-len(encoded) // tarfile.BLOCKSIZE)
            offset = tar.offset - num_blocks * tarfile.BLOCKSIZE  # the image fills the last blocks
            rows.append((key, class_id, offset, len(encoded)))
    index = ShardIndex.of(rows)
    index.sha256 = file_sha256(path)
    write_index(path, index, path.stat().st_size)
    return {"samples": len(index), "bytes": path.stat().st_size, "sha256": index.sha256}


def index_shards(shards: list[Path], processes: int) -> Iterator[Path]:
    """Write the indices of existing shards by reading their headers; yields the finished shards. Raises InputError for
    a damaged shard."""

    def write(chunk: range) -> None:
        path = shards[chunk.start]
        write_index(path, read_headers(path), path.stat().st_size)

    for chunk in in_processes(write, [range(i, i + 1) for i in range(len(shards))], processes):
        yield shards[chunk.start]
