"""Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist, MIT): 60,000 training and 10,000 test images of ten
kinds of clothing, from the four IDX files that torchvision or Debian's package leave on disk.

Images of 28 x 28 grey pixels are padded to 32 x 32 with black, their background, and stored as RGB PNG.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.images.shard_writer import HELDOUT_PREFIX, Shard, ShardSample, write_shard
from data.images.tar_shards import CLASS_NAMES_FILE, COUNTS_FILE
from utils.errors import InputError
from utils.files.atomic import atomic_folder, write_text
from utils.files.chunk_files import PROVENANCE_FILE
from utils.files.provenance import is_made, write_record
from utils.randomness import Stream, permutation, philox

CLASS_NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SPLITS = {"train": "train", HELDOUT_PREFIX: "t10k"}  # our name: the name in the IDX files
SHA256 = {  # of the files without .gz, since Debian compresses them again
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
OF_DEBIAN, OF_TORCHVISION = Path("usr/share/datasets/fashion-mnist"), Path("FashionMNIST/raw")
SOURCES = [Path("/") / OF_DEBIAN, *(Path(root) / OF_TORCHVISION for root in ("data", "dataset", "."))]
HOW_TO_GET = (
    "get the files with `python -c \"from torchvision.datasets import FashionMNIST; FashionMNIST('data', "
    'download=True)"`, or with `apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .` and '
    "--source ."
)
IMAGES_HEADER, LABELS_HEADER = 16, 8  # bytes
EDGE, PADDING = 28, 2  # pixels
IMAGES_PER_SHARD = 5000


@dataclass(frozen=True)
class Split:
    """Images (n, 28, 28) and labels (n,), uint8."""

    images: np.ndarray
    labels: np.ndarray

    def image(self, index: int) -> Image.Image:
        """An image of 32 x 32 pixels, RGB."""
        padded = np.pad(self.images[index], PADDING)
        return Image.fromarray(padded.repeat(3).reshape(*padded.shape, 3))


def find_source(given: Path | None) -> Path:
    """The folder of the IDX files: `given`, or where torchvision and Debian leave them, also below `given`. Raises
    InputError if there is none."""
    folders = SOURCES if given is None else [given, given / OF_TORCHVISION, given / OF_DEBIAN]
    first = next(iter(SHA256))
    for folder in folders:
        if (folder / first).is_file() or (folder / f"{first}.gz").is_file():
            return folder
    searched = ", ".join(str(folder) for folder in folders)
    raise InputError(f"found no {first} or {first}.gz in {searched}; {HOW_TO_GET}")


def read_split(source: Path, name: str) -> Split:
    """`name`: train or heldout. Raises InputError for a file that is missing, damaged or of a different data set."""
    images = _read(source, f"{SPLITS[name]}-images-idx3-ubyte")
    labels = _read(source, f"{SPLITS[name]}-labels-idx1-ubyte")
    return Split(
        images=np.frombuffer(images, np.uint8, offset=IMAGES_HEADER).reshape(-1, EDGE, EDGE),
        labels=np.frombuffer(labels, np.uint8, offset=LABELS_HEADER),
    )


def _read(source: Path, name: str) -> bytes:
    plain, compressed = source / name, source / f"{name}.gz"
    path = plain if plain.is_file() else compressed
    if not path.is_file():
        raise InputError(f"{source}: found no {name} or {name}.gz; {HOW_TO_GET}")
    try:
        content = plain.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged ({error}); {HOW_TO_GET}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise InputError(
            f"{path}: found content with sha256 {found[:12]}..., expected {SHA256[name][:12]}...: it is damaged, or of "
            f"another data set (MNIST's files have the same names); {HOW_TO_GET}"
        )
    return content


def is_written(output: Path, form: str) -> bool:
    """Whether `output` is complete; `form`: shards or folder. Raises InputError for another folder of that name."""
    return is_made(output, _provenance(form), output / PROVENANCE_FILE)


def _provenance(form: str) -> dict[str, Any]:
    return {"form": form, **{f"sha256 of {name}": sha256 for name, sha256 in SHA256.items()}}


def write_shards(source: Path, output: Path) -> None:
    """Write train-*.tar, heldout-*.tar (the test images), their indices, shards.json, classes.json and provenance.json,
    atomically."""
    splits = {name: read_split(source, name) for name in SPLITS}
    planned = [(name, shard) for name, split in splits.items() for shard in _plan(name, len(split.labels))]
    with atomic_folder(output) as partial:
        counts = {}
        for name, shard in tqdm(planned, unit="shard"):
            samples = _samples(splits[name], name, shard.indices)
            counts[shard.name] = write_shard(partial / shard.name, samples)
        write_text(partial / COUNTS_FILE, json.dumps(counts, indent=1) + "\n")
        write_text(partial / CLASS_NAMES_FILE, json.dumps(CLASS_NAMES) + "\n")
        write_record(output, _provenance("shards"), partial / PROVENANCE_FILE)


def _plan(name: str, count: int) -> list[Shard]:
    """The shards of a split, in shuffled order, so that every shard holds all classes."""
    order = permutation(philox(Stream.SHARDS, 0, 0), count)
    starts = range(0, count, IMAGES_PER_SHARD)
    return [
        Shard(f"{name}-{number:06d}.tar", order[start : start + IMAGES_PER_SHARD])
        for number, start in enumerate(starts)
    ]


def _samples(split: Split, name: str, indices: np.ndarray) -> Iterator[ShardSample]:
    for index in indices.tolist():
        png = io.BytesIO()
        split.image(index).save(png, "PNG")
        yield ShardSample(f"{name}/{index:05d}", int(split.labels[index]), ".png", png.getvalue())


def write_folder(source: Path, output: Path) -> None:
    """Write train/<class id>_<class>/<index>.png, heldout/... and provenance.json, atomically."""
    splits = {name: read_split(source, name) for name in SPLITS}
    with atomic_folder(output) as partial:
        for name, split in splits.items():
            folders = [partial / name / f"{number}_{class_name}" for number, class_name in enumerate(CLASS_NAMES)]
            for folder in folders:
                folder.mkdir(parents=True)
            for index, label in enumerate(tqdm(split.labels.tolist(), desc=name, unit="image")):
                split.image(index).save(folders[label] / f"{index:05d}.png")
        write_record(output, _provenance("folder"), partial / PROVENANCE_FILE)
