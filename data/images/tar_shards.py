"""Random access to the samples of webdataset shards: `<key>.jpg` (or png, webp, ...) and `<key>.cls` (number or name).

The package webdataset (https://github.com/webdataset/webdataset) only streams. Offsets come from the index next to a
shard, else all tar headers are read.
"""

import fnmatch
import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from data.images.image_io import IMAGE_EXTENSIONS
from data.images.image_source import ImageSource, is_ignored, printable, to_text
from data.images.notices import SkippedFiles
from data.images.shard_index import ShardIndex, index_path, read_index
from utils.errors import InputError, errors_name, first_line
from utils.files.hashing import file_sha256, hash_of
from utils.files.json_file import read_json
from utils.files.text import same_letters

CLASS_NAMES_FILE = "classes.json"
COUNTS_FILE = "shards.json"
READ_BYTES = 2**20  # at once
CLASS_FIELDS = ("cls", "label", "class")  # of a JSON record
MAX_RECORD_BYTES, MAX_LABEL = 2**20, 200


class ShardSamples(ImageSource):
    """The samples of shards by their indices, without access to the images.

    Args:
        shards: paths or URLs, for messages.
        indices: of the shards.
        class_names: from classes.json, if there is one.
        sha256: of the shards, as far as they are stated.

    Raises InputError for two samples of one key, or classes by number in one shard and by name in another.
    """

    def __init__(
        self, shards: Sequence[object], indices: list[ShardIndex], class_names: list[str] | None, sha256: list[str]
    ) -> None:
        self._names = list(map(str, shards))
        self._sha256 = sha256
        self._parts = [len(index) for index in indices]
        self._shard_of = np.repeat(np.arange(len(indices)), self._parts)
        self._keys = np.concatenate([index.keys for index in indices])
        self.class_ids, self.class_names = self._common_classes(indices, class_names)
        self._check_keys()

    def _common_classes(
        self, indices: list[ShardIndex], class_names: list[str] | None
    ) -> tuple[np.ndarray, list[str] | None]:
        """Class ids (n,) and class names for all shards; those of `.cls` members without numbers are sorted, unless
        classes.json has an order."""
        by_name = [index.labels is not None for index in indices]
        if not any(by_name):
            return np.concatenate([index.class_ids for index in indices]), class_names
        if not all(by_name):
            raise InputError(
                f"{self._names[by_name.index(False)]}: found classes by number, expected names as in "
                f"{self._names[by_name.index(True)]}"
            )
        names = class_names or sorted({label for index in indices for label in index.labels or ()})
        ids = {name: class_id for class_id, name in enumerate(names)}
        parts = []
        for shard, index in zip(self._names, indices, strict=True):
            labels = index.labels or []
            unknown = next((label for label in labels if label not in ids), None)
            if unknown is not None:
                raise InputError(f"{shard}: found the class {unknown!r}, expected one of {CLASS_NAMES_FILE}")
            parts.append(np.array([ids[label] for label in labels], dtype=np.int32)[index.class_ids])
        return np.concatenate(parts), names

    def _check_keys(self) -> None:
        """Raise InputError for two samples of one key, as in a shard and its copy."""
        order = np.argsort(self._keys, kind="stable")
        repeated = np.flatnonzero(self._keys[order[1:]] == self._keys[order[:-1]])
        if len(repeated):
            first, second = order[repeated[0] : repeated[0] + 2].tolist()
            raise InputError(
                f"{self.location(second)}: found {len(repeated)} keys that other samples have too, such as "
                f"{self.location(first)}; expected each key once: remove the copy or rename its samples"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of keys and class ids and, if `shards.json` states the hashes of all shards, of their contents."""
        samples = super().fingerprint
        return hash_of({"samples": samples, "sha256": self._sha256}) if all(self._sha256) else samples

    @property
    def parts(self) -> list[int]:
        return self._parts

    def key(self, index: int) -> str:
        return to_text(self._keys[index])

    def location(self, index: int) -> str:
        return f"{self._names[self._shard_of[index]]}, sample {printable(self.key(index))!r}"

    def files(self) -> Iterator[Path]:
        return iter(())

    def _read(self, index: int) -> bytes:
        raise AssertionError("the shards are not here")


class TarShards(ShardSamples):
    """The samples of shards in their order. Raises InputError for missing or damaged shards, incomplete samples and two
    samples of one key.

    Args:
        pattern: as for `find_shards`, or URLs.
        copies: of the shards, if the pattern names URLs.
    """

    def __init__(self, pattern: str, copies: list[Path] | None = None) -> None:
        self.shards = find_shards(pattern) if copies is None else copies
        names = [Path(name).name for name in expand_braces(pattern)[1]] if copies is None else []
        progress = tqdm(self.shards, desc="opening shards", unit="shard", delay=2)
        indices = {shard: read_index(shard) or read_headers(shard) for shard in progress}
        sha256 = check_counts(names, indices)
        self._offsets = np.concatenate([index.offsets for index in indices.values()])
        self._sizes = np.concatenate([index.sizes for index in indices.values()])
        super().__init__(self.shards, list(indices.values()), read_class_names(self.shards), sha256)

    def files(self) -> Iterator[Path]:
        return iter(self.shards)

    def has_stated_content(self) -> bool:
        return [file_sha256(shard, progress=True) for shard in self.shards] == self._sha256

    def _read(self, index: int) -> bytes:
        # Opened for every image: processes share nothing, and thousands of shards need no open files.
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
    """Files of a path, of "a-{000..252}.tar" or of a glob; raises InputError for a name without a file."""
    folder, names = expand_braces(pattern)
    shards: list[Path] = []
    for name in names:
        found = [folder / path for path in sorted(glob.glob(name, root_dir=folder)) if (folder / path).is_file()]
        if not found:
            nearest = next(parent for parent in (folder / name).absolute().parents if parent.is_dir())
            tars = len(list(nearest.glob("*.tar")))
            raise InputError(f"{folder / name}: no such shard; the nearest folder is {nearest}, with {tars} .tar files")
        shards += found
    repeated = next((shard for shard, count in Counter(shards).items() if count > 1), None)
    if repeated is not None:
        raise InputError(f"{pattern}: found {repeated} twice, expected each shard once")
    return shards


def has_shards(pattern: str) -> bool:
    folder, names = expand_braces(pattern)
    return any(glob.glob(name, root_dir=folder) for name in names)


def expand_braces(pattern: str) -> tuple[Path, list[str]]:
    """The folder of a pattern, and the names in it: three for "a-{00..02}.tar", one for an existing file.

    The longest part of the pattern that exists is the folder, so a folder `a[1]` is found by its name.
    """
    path = Path(pattern)
    if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        return path.parent, [glob.escape(path.name)]
    folder = next(parent for parent in (path, *path.parents) if os.path.isdir(parent))
    try:
        return folder, list(braceexpand(str(path.relative_to(folder))))
    except ValueError as error:
        raise InputError(f"{pattern}: expected balanced braces, as in train-{{000..252}}.tar") from error


def check_counts(names: Sequence[str], found: dict[Path, ShardIndex]) -> list[str]:
    """Compare shards with the `shards.json` next to them, if there is one; raises InputError for differences. It
    detects a shard that a glob misses, by the patterns `names`, and a well-formed shard that lacks samples.

    It maps a shard's name to its number of samples or to `{"samples": 1000, "bytes": 12345, "sha256": "..."}`. Returns
    sha256 of all shards in order, empty where it is not stated.
    """
    hashes: dict[Path, str] = {}
    for folder in sorted({shard.parent for shard in found}):
        path = folder / COUNTS_FILE
        if not path.is_file():
            continue
        for name, record in _read_counts(path).items():
            shard = folder / name
            if shard in found:
                _check_shard(shard, found[shard], record, path)
                hashes[shard] = record.get("sha256", "")
            elif any(fnmatch.fnmatch(name, wanted) for wanted in names):
                raise InputError(f"{shard}: no such shard, expected {record['samples']} samples as in {path}")
    return [hashes.get(shard, "") for shard in found]


def _check_shard(shard: Path, index: ShardIndex, record: dict[str, Any], path: Path) -> None:
    if len(index) != record["samples"]:
        raise InputError(f"{shard}: found {len(index)} samples, expected {record['samples']} as in {path}")
    size = shard.stat().st_size
    if size != record.get("bytes", size):
        raise InputError(f"{shard}: found {size} bytes, expected {record['bytes']} as in {path}")
    sha256 = record.get("sha256")
    if sha256 and index.sha256 and index.sha256 != sha256:
        raise InputError(
            f"{index_path(shard)}: found the index of a shard of sha256 {index.sha256[:12]}..., "
            f"expected {sha256[:12]}... as in {path}"
        )


def _read_counts(path: Path) -> dict[str, dict[str, Any]]:
    counts = read_json(path)
    if not isinstance(counts, dict):
        raise InputError(f"{path}: found {str(counts)[:40]}, expected a JSON object of shard names and counts")
    return {name: record if isinstance(record, dict) else {"samples": record} for name, record in counts.items()}


def read_headers(shard: Path) -> ShardIndex:
    """Index a shard by reading all its headers and classes; raises InputError for damage and incomplete samples.

    A sample is an image and its class: a number or a name in `<key>.cls`, else in the field `cls`, `label` or `class`
    of `<key>.json`, where img2dataset keeps further columns.
    """
    images: dict[str, tarfile.TarInfo] = {}
    named_images: dict[str, list[tarfile.TarInfo]] = {}  # such as <key>.image.jpg
    classes: dict[str, str] = {}
    records: dict[str, tarfile.TarInfo] = {}
    others: list[tarfile.TarInfo] = []
    skipped = SkippedFiles()
    end = 0
    try:
        with errors_name(shard), tarfile.open(shard, "r:", encoding="utf-8") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key, extension = _key_and_extension(member.name)
                if member.isdir():
                    continue
                if _is_ignored(member.name):
                    skipped.add(member.name, "hidden, or added by a system")
                elif not member.isreg():
                    skipped.add(member.name, "a link")
                elif extension in IMAGE_EXTENSIONS:
                    if key in images:
                        raise InputError(f"{shard}, sample {printable(key)!r}: found two images, expected one")
                    images[key] = member
                elif extension == "cls":
                    if key in classes:
                        raise InputError(f"{shard}, sample {printable(key)!r}: found two class ids, expected one")
                    classes[key] = _read_class(shard, tar, member)
                elif extension == "json":
                    records[key] = member
                elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                    named_images.setdefault(key, []).append(member)
                else:
                    others.append(member)
            for key in [key for key in named_images if key not in images and (key in classes or key in records)]:
                images[key] = _only_image(shard, key, named_images.pop(key))
            for key in [key for key in records if key in images and key not in classes]:
                classes[key] = _class_of_record(shard, tar, records.pop(key))
    except tarfile.TarError as error:
        raise InputError(f"{shard}: {error}, after {len(images)} images; expected a complete, plain tar") from error
    others += [*records.values(), *(member for members in named_images.values() for member in members)]
    for member in sorted(others, key=lambda member: member.offset):
        skipped.add(member.name, "no image extension after the first dot")
    skipped.notify(str(shard))
    _check_end(shard, end, len(images))
    if not images:
        raise InputError(f"{shard}: found no {'/'.join(IMAGE_EXTENSIONS)} member, expected at least one sample")
    incomplete = images.keys() ^ classes.keys()
    if incomplete:
        key = min(incomplete)
        missing = "class id (.cls)" if key in images else "image"
        raise InputError(f"{shard}, sample {printable(key)!r}: found no {missing}")
    class_ids, labels = _class_ids(shard, {key: classes[key] for key in images})
    index = ShardIndex.of([(key, class_ids[key], image.offset_data, image.size) for key, image in images.items()])
    index.labels = labels
    return index


def _read_class(shard: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = tar.extractfile(member).read(MAX_RECORD_BYTES).strip()  # type: ignore[union-attr]
    return _checked_class(f"{shard}, member {printable(member.name)!r}", content.decode("utf-8", "replace"))


def _class_of_record(shard: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The class in a JSON object; raises InputError without one."""
    where = f"{shard}, member {printable(member.name)!r}"
    try:
        record = json.loads(tar.extractfile(member).read(MAX_RECORD_BYTES))  # type: ignore[union-attr]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: found no JSON: {first_line(error)}") from error
    fields = record if isinstance(record, dict) else {}
    found = next((fields[name] for name in CLASS_FIELDS if fields.get(name) is not None), None)
    if found is None:
        raise InputError(
            f"{where}: found no field {', '.join(CLASS_FIELDS)}, expected one, or a class in a .cls member"
        )
    return _checked_class(where, str(found).strip())


def _checked_class(where: str, text: str) -> str:
    """A class id or name; raises InputError for an empty or long text, and for a number that is no class id."""
    is_number = re.fullmatch(r"[+-]?[\d.]+", text) is not None
    if not text.isprintable() or not 0 < len(text) <= MAX_LABEL or (is_number and not _is_class_id(text)):
        raise InputError(f"{where}: found {text[:20]!r}, expected a number such as 7, or a name")
    return same_letters(text)


def _is_class_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _class_ids(shard: Path, classes: dict[str, str]) -> tuple[dict[str, int], list[str] | None]:
    """Class id by key and, if the classes are names, the names in the order of the ids."""
    numbers = sum(map(_is_class_id, classes.values()))
    if numbers == len(classes):
        return {key: int(text) for key, text in classes.items()}, None
    if numbers:
        key = next(key for key, text in classes.items() if not _is_class_id(text))
        raise InputError(
            f"{shard}, sample {printable(key)!r}: found the class {classes[key]!r} next to {numbers} class ids, "
            "expected numbers only, or names only"
        )
    labels = sorted(set(classes.values()))
    ids = {label: class_id for class_id, label in enumerate(labels)}
    return {key: ids[text] for key, text in classes.items()}, labels


def _only_image(shard: Path, key: str, members: list[tarfile.TarInfo]) -> tarfile.TarInfo:
    if len(members) > 1:
        names = ", ".join(printable(member.name) for member in members)
        raise InputError(f"{shard}, sample {printable(key)!r}: found the images {names}, expected one")
    return members[0]


def _key_and_extension(name: str) -> tuple[str, str]:
    """As in webdataset, the key of a sample ends at the first dot of the file name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _is_ignored(name: str) -> bool:
    return any(is_ignored(part) for part in name.split("/") if part not in (".", ".."))


def _check_end(shard: Path, end: int, num_images: int) -> None:
    """Raise InputError without an end mark, since a tar cut between two members reads like a shorter one, or for data
    after it, which no reader would see, as in two tars joined by `cat`."""
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{shard}: cut or damaged at byte {end}, after {num_images} images; expected an end mark")
        while block := file.read(READ_BYTES):
            if block.count(0) != len(block):
                raise InputError(
                    f"{shard}: found data after the end mark at byte {end}, after {num_images} images, expected zeros; "
                    "join tars with `tar --concatenate`, not with cat"
                )


def read_class_names(shards: list[Path]) -> list[str] | None:
    """Class names from `classes.json` next to the shards, in the order of the class ids; None without it."""
    paths = [folder / CLASS_NAMES_FILE for folder in dict.fromkeys(shard.parent for shard in shards)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        return None
    names = read_names(paths[0])
    for path in paths[1:]:
        if read_names(path) != names:
            raise InputError(f"{path}: found other class names than in {paths[0]}; expected the same classes")
    return names


def read_names(path: Path) -> list[str]:
    """The JSON list of class names in a file, in NFC."""
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: found {str(names)[:40]}, expected a JSON list of class names")
    return list(map(same_letters, names))
