"""Webdataset shards from a folder per class: the images untouched, the bytes of the shards reproducible."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images.image_folder import ImageFolder
from data.images.tar_shards import CLASS_NAMES_FILE, COUNTS_FILE
from utils.errors import InputError
from utils.files.atomic import complete_file
from utils.files.hashing import file_sha256
from utils.files.parts import Parts
from utils.processes import in_processes
from utils.run.faults import fault_point

ORDER_SEED = 0
FILE_MODE = 0o444
HELDOUT_PREFIX = "heldout"


class Shard(NamedTuple):
    name: str
    indices: np.ndarray  # of its images in the source


def plan_shards(source: ImageFolder, prefix: str, samples_per_shard: int, heldout: float) -> list[Shard]:
    """Shuffled, so that every shard holds all classes.

    Args:
        heldout: share of each class, rounded down, that goes to the shards `heldout-*.tar`.
    """
    order = np.random.Generator(np.random.Philox(key=ORDER_SEED)).permutation(len(source))
    by_class = order[np.argsort(source.class_ids[order], kind="stable")]  # grouped, shuffled within a class
    counts = np.bincount(source.class_ids)
    rank = np.empty(len(source), dtype=np.int64)  # within the class
    rank[by_class] = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_heldout = rank < (heldout * counts).astype(np.int64)[source.class_ids]
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
) -> Iterator[int]:
    """Write them, shards.json and classes.json to a folder that appears when all is done; yields numbers of images.

    Until then the shards lie in `<output>.parts/`, from where the next call goes on.

    Raises:
        InputError: a file that cannot be read, or parts of another source.
    """
    parts = Parts(parts_folder(output), len(shards), 1, ".json")
    fingerprint = {"images": source.fingerprint, "class names": class_names}
    fingerprint |= {shard.name: len(shard.indices) for shard in shards}
    parts.claim(fingerprint)
    parts.check(fingerprint)
    folder = parts.folder / "shards"
    folder.mkdir(exist_ok=True)
    keys = unique_keys(source)

    def write(block: range) -> None:
        shard = shards[block.start]
        with parts.writing(block) as record:
            with complete_file(folder / shard.name) as partial:
                write_shard(partial, source, shard.indices, keys)
            path = folder / shard.name
            facts = {"samples": len(shard.indices), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            record.write_text(json.dumps(facts))

    missing = parts.missing()
    yield sum(len(shard.indices) for shard in shards) - sum(len(shards[block.start].indices) for block in missing)
    for block in in_processes(write, missing, processes):
        yield len(shards[block.start].indices)
    fault_point("join.begin", 0)
    records = {shards[block.start].name: json.loads(parts.path(block).read_text()) for block in parts.blocks}
    (folder / COUNTS_FILE).write_text(json.dumps(records, indent=1) + "\n")
    (folder / CLASS_NAMES_FILE).write_text(json.dumps(class_names) + "\n")
    fault_point("join.end", 0)
    folder.rename(output)
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


def write_shard(path: Path, source: ImageFolder, indices: np.ndarray, keys: list[str]) -> None:
    """Per image `<key>.cls` and `<key>.<extension>`, in order, without times and owners."""
    with path.open("wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for index in indices.tolist():
            try:
                encoded = source.read(index)
            except OSError as error:
                raise InputError(f"{source.location(index)}: cannot be read: {error.strerror}") from error
            if not encoded:
                raise InputError(f"{source.location(index)}: found an empty file, expected an image")
            extension = Path(source.key(index)).suffix.lower()
            for suffix, content in ((".cls", str(source.class_ids[index]).encode()), (extension, encoded)):
                member = tarfile.TarInfo(keys[index] + suffix)
                member.size, member.mode = len(content), FILE_MODE
                tar.addfile(member, io.BytesIO(content))
