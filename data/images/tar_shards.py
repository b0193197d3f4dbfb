"""Random access to the samples of webdataset shards: `<key>.jpg` (or png, webp, ...) and `<key>.cls` (a number).

webdataset 1.0 itself only streams; here images are read by offset. Offsets come from the index beside a shard or, where
there is none, from the headers, all of which are then read. The format: https://github.com/webdataset/webdataset
"""

import fnmatch
import glob
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from data.images.image_io import IMAGE_EXTENSIONS
from data.images.image_source import ImageSource, printable, to_text
from data.images.notices import LeftOut
from data.images.shard_index import ShardIndex, index_path, read_index
from utils.errors import InputError
from utils.files.hashing import hash_of

CLASS_NAMES_FILE = "classes.json"
COUNTS_FILE = "shards.json"


class TarShards(ImageSource):
    """The samples of some shards, in the order of the shards and within them.

    Raises:
        InputError: a missing, empty or damaged shard, a sample without its image or its class id, or an index that
            belongs to another shard.
    """

    def __init__(self, pattern: str) -> None:
        self.shards = find_shards(pattern)
        progress = tqdm(self.shards, desc="opening shards", unit="shard", delay=2)
        indices = {shard: read_index(shard) or read_headers(shard) for shard in progress}
        self._sha256 = check_counts(pattern, indices)
        self._shard_of = np.repeat(np.arange(len(indices)), list(map(len, indices.values())))
        self._keys, self.class_ids, self._offsets, self._sizes = (
            np.concatenate([getattr(index, column) for index in indices.values()])
            for column in ("keys", "class_ids", "offsets", "sizes")
        )
        self.class_names = read_class_names(self.shards)

    @property
    def fingerprint(self) -> str:
        """As of any source; of shards whose hashes `shards.json` tells, equal contents too."""
        return (
            hash_of({"samples": super().fingerprint, "sha256": self._sha256}) if self._sha256 else super().fingerprint
        )

    def key(self, index: int) -> str:
        return to_text(self._keys[index])

    def location(self, index: int) -> str:
        return f"{self.shards[self._shard_of[index]]}, sample {printable(self.key(index))!r}"

    def _read(self, index: int) -> bytes:
        # Opened for every image: nothing is shared between processes, and thousands of shards need no open files.
        with self.shards[self._shard_of[index]].open("rb") as shard:
            shard.seek(self._offsets[index])
            encoded = shard.read(self._sizes[index])
        if len(encoded) != self._sizes[index]:
            raise InputError(
                f"{self.location(index)}: found {len(encoded)} bytes, expected {self._sizes[index]}; "
                "the shard was changed after it was opened"
            )
        return encoded


def find_shards(pattern: str) -> list[Path]:
    """Files of a path, of "a-{000..252}.tar" or of a glob; every name that the braces give must exist."""
    shards: list[Path] = []
    for name in names_of(pattern):
        found = sorted(path for path in glob.glob(name) if Path(path).is_file())
        if not found:
            nearest = next(parent for parent in Path(name).absolute().parents if parent.is_dir())
            tars = len(list(nearest.glob("*.tar")))
            raise InputError(f"{name}: no such shard; the nearest folder is {nearest}, with {tars} .tar files")
        shards += map(Path, found)
    return shards


def has_shards(pattern: str) -> bool:
    return any(glob.glob(name) for name in names_of(pattern))


def names_of(pattern: str) -> list[str]:
    """What braces stand for: "a-{00..02}.tar" for three names."""
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern}: expected balanced braces, as in train-{{000..252}}.tar") from error


def check_counts(pattern: str, found: dict[Path, ShardIndex]) -> list[str]:
    """Compare with `shards.json` beside the shards, if there is one: by name the samples of a shard, as a number or as
    `{"samples": 1000, "bytes": 12345, "sha256": "..."}`.

    Only that file can tell that a glob finds too few shards, or that a well-formed shard lacks samples.

    Returns:
        The sha256 of all shards in order, if it tells them; they are compared with those of indices only.

    Raises:
        InputError: a shard of the pattern is missing or has another number of samples or bytes, its index another
            sha256, or the file is damaged.
    """
    hashes: dict[Path, str] = {}
    for folder in sorted({shard.parent for shard in found}):
        path = folder / COUNTS_FILE
        if not path.is_file():
            continue
        patterns = [Path(name).name for name in names_of(pattern)]
        for name, record in _read_counts(path).items():
            shard, expected = folder / name, record["samples"]
            if shard in found and len(found[shard]) != expected:
                raise InputError(f"{shard}: found {len(found[shard])} samples, expected {expected} as in {path}")
            if shard in found and shard.stat().st_size != record.get("bytes", shard.stat().st_size):
                size = shard.stat().st_size
                raise InputError(f"{shard}: found {size} bytes, expected {record['bytes']} as in {path}")
            sha256 = record.get("sha256")
            if shard in found and sha256 and found[shard].sha256 not in ("", sha256):
                raise InputError(
                    f"{index_path(shard)}: found the index of a shard of sha256 {found[shard].sha256[:12]}..., "
                    f"expected {sha256[:12]}... as in {path}"
                )
            if shard not in found and any(fnmatch.fnmatch(name, wanted) for wanted in patterns):
                raise InputError(f"{shard}: no such shard, expected {expected} samples as in {path}")
            hashes[shard] = sha256 or ""
    in_order = [hashes.get(shard, "") for shard in found]
    return in_order if all(in_order) else []


def _read_counts(path: Path) -> dict[str, dict[str, Any]]:
    try:
        counts = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: {error}; expected a JSON object of shard names and counts") from error
    if not isinstance(counts, dict):
        raise InputError(f"{path}: found {str(counts)[:40]}, expected a JSON object of shard names and counts")
    return {name: record if isinstance(record, dict) else {"samples": record} for name, record in counts.items()}


def read_headers(shard: Path) -> ShardIndex:
    """Index a shard by reading all its headers and class ids.

    Raises:
        InputError: the shard is empty, cut, compressed or no tar, or a sample is incomplete.
    """
    images: dict[str, tarfile.TarInfo] = {}
    class_ids: dict[str, int] = {}
    others: dict[str, str] = {}  # key by name of image members with an extension of two parts, such as .seg.png
    left_out, end = LeftOut(), 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key, extension = _key_and_extension(member.name)
                if member.isdir() or _is_hidden(member.name):
                    continue
                if extension in IMAGE_EXTENSIONS:
                    if key in images:
                        raise InputError(f"{shard}, sample {printable(key)!r}: found two images, expected one")
                    images[key] = member
                elif extension == "cls":
                    where, file = f"{shard}, sample {printable(key)!r}", tar.extractfile(member)
                    if file is None:
                        raise InputError(f"{where}: found a .cls that is no file, expected a class id")
                    class_ids[key] = _parse_class_id(file.read(), where)
                elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                    others[member.name] = key
                else:
                    left_out.add(member.name, "no image")
    except tarfile.TarError as error:
        raise InputError(f"{shard}: {error}, after {len(images)} images; expected a complete, plain tar") from error
    _check_end(shard, end, len(images))
    _check_others(shard, others, images)
    if not images:
        raise InputError(f"{shard}: found no {'/'.join(IMAGE_EXTENSIONS)} member, expected at least one sample")
    incomplete = images.keys() ^ class_ids.keys()
    if incomplete:
        key = min(incomplete)
        found = "class id (.cls)" if key in images else "image"
        raise InputError(f"{shard}, sample {printable(key)!r}: found no {found}")
    for name in others:
        left_out.add(name, "not the image of its sample")
    left_out.notify(str(shard))
    return ShardIndex.of([(key, class_ids[key], image.offset_data, image.size) for key, image in images.items()])


def _key_and_extension(name: str) -> tuple[str, str]:
    """As webdataset has it: the key of a sample ends at the first dot of the file name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _check_others(shard: Path, others: dict[str, str], images: dict[str, tarfile.TarInfo]) -> None:
    """
    Raises:
        InputError: image members that would be lost, or that are links: only beside the image of their sample may there
            be others, such as masks.
    """
    numbered = [name for name, key in others.items() if key not in images or _key_and_extension(name)[1][0].isdigit()]
    if numbered:
        raise InputError(
            f"{shard}, member {printable(numbered[0])!r}: becomes no sample, for the key of a sample ends at the first "
            f"dot of its name, and so do {len(numbered) - 1} others; expected names with one dot"
        )
    linked = [member.name for member in images.values() if not member.isreg()]
    if linked:
        raise InputError(f"{shard}, member {printable(linked[0])!r}: found a link, expected a file")


def _parse_class_id(text: bytes, where: str) -> int:
    digits = text.strip()
    if not digits.isdigit() or len(digits) > 9:
        raise InputError(f"{where}: .cls holds {text[:20]!r}, expected a class id such as 7")
    return int(digits)


def _check_end(shard: Path, end: int, num_images: int) -> None:
    """A tar that is cut between two members reads like a shorter one; only its end mark is missing."""
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{shard}: cut or damaged at byte {end}, after {num_images} images; expected an end mark")


def read_class_names(shards: list[Path]) -> list[str] | None:
    """Names from `classes.json` beside the shards, a list in the order of the class ids; None without the file.

    Raises:
        InputError: the files of two folders differ.
    """
    paths = [folder / CLASS_NAMES_FILE for folder in dict.fromkeys(shard.parent for shard in shards)]
    of_paths = [(path, read_names(path)) for path in paths if path.is_file()]
    for path, names in of_paths:
        if names != of_paths[0][1]:
            raise InputError(f"{path}: found other class names than in {of_paths[0][0]}; expected the same classes")
    return of_paths[0][1] if of_paths else None


def read_names(path: Path) -> list[str]:
    """
    Raises:
        InputError: anything but a JSON list of strings.
    """
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; expected a JSON list of class names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: found {str(names)[:40]}, expected a JSON list of class names")
    return names
