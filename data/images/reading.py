"""Images with class ids for a DataLoader, from tar shards or from a folder per class."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, default_collate

from data.batch_sampler import SampleIndex, as_sample_index
from data.images.image_folder import ImageFolder
from data.images.image_io import ImageDecoding
from data.images.image_source import ImageSource
from data.images.notices import SkippedImages
from data.images.shard_cache import ShardCache
from data.images.shard_urls import is_url
from data.images.tar_shards import TarShards
from data.images.transforms import NUM_DRAWS, Transform
from utils.errors import InputError
from utils.randomness import Stream, philox, uniforms
from utils.schema import DatasetParams


def open_images(
    path: str,
    num_classes: int | None = None,
    decoding: ImageDecoding | None = None,
    cache: ShardCache | None = None,
) -> ImageSource:
    """Open webdataset shards (a path, "a-{000..252}.tar", a glob, or URLs) or a folder with a sub-folder per class.

    Args:
        num_classes: number of classes of the model, if there is one.
        decoding: how files become pixels; None: white behind transparency, EXIF orientation ignored.
        cache: for copies of shards at URLs.

    Raises:
        InputError: nothing there, something damaged, or a class id out of range; the message names file and sample.
    """
    source: ImageSource
    if is_url(path):
        if cache is None:
            raise InputError(
                f"{path}: found URLs, expected local shards, or dataset.params.cache_dir, a folder for copies"
            )
        source = TarShards(path, copies=cache.fetch(path))
    else:
        source = ImageFolder(Path(path)) if os.path.isdir(path) else TarShards(path)
    source.decoding = decoding or ImageDecoding()
    source.check_class_ids(num_classes)
    return source


def allowed_bad_fraction(params: DatasetParams) -> float:
    """Share of bad samples that may be left out."""
    return params.max_bad_fraction if params.on_bad_sample == "skip" else 0.0


class ImageDataset(Dataset):
    """Transformed images of a source.

    Items are indexed by a plain index (pass 0) or by `SampleIndex(index, dataset_pass)`.
    Augmentation depends on (seed, dataset pass, index) only.

    Args:
        max_bad_fraction: allowed share of unreadable images, each replaced by the next readable one; 0: raise.

    Attributes:
        workers: default number of processes that read it.
        skipped: counts unreadable images; the reader of batches passes it their `index` and `skipped`.
    """

    collate = staticmethod(default_collate)
    workers = 12

    def __init__(self, source: ImageSource, transform: Transform, seed: int, max_bad_fraction: float = 0.0) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.skipped = SkippedImages(source, max_bad_fraction)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def class_names(self) -> list[str] | None:
        return self.source.class_names

    @property
    def class_ids(self) -> np.ndarray:
        """(num_images,)"""
        return self.source.class_ids

    def __getitem__(self, item: int | SampleIndex) -> dict[str, Any]:
        """image: the transform's result, uint8 (H, W, 3); class_labels and index: int; skipped: whether the image is
        unreadable, and replaced by the next readable image with its label.

        Raises InputError if the image cannot be read or decoded.
        """
        index, dataset_pass = as_sample_index(item)
        image, found_at = self._next_readable(index)
        draws = uniforms(philox(Stream.AUGMENTATION, self.seed, dataset_pass * len(self) + index), NUM_DRAWS)
        return {
            "image": self.transform(image, draws),
            "class_labels": int(self.class_ids[found_at]),
            "index": index,
            "skipped": found_at != index,
        }

    def _next_readable(self, index: int) -> tuple[Image.Image, int]:
        """The first readable image from an index on, and its index."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self.source.load(candidate), candidate
            except InputError:
                if not self.skipped.max_bad_fraction:
                    raise
        raise InputError(f"{self.source.location(index)}: cannot be decoded, nor can any other image")


class CroppedImages:
    """Images of a data set with a deterministic transform, read in slices by several threads.

    Args:
        indices: indices of the images; None: all.
    """

    def __init__(self, dataset: ImageDataset, indices: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.indices = range(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, uint8 (stop - start, H, W, 3)."""
        with ThreadPoolExecutor() as threads:
            batch = self.dataset.collate(list(threads.map(self.dataset.__getitem__, self.indices[start:stop])))
        self.dataset.skipped.add(batch["index"], batch["skipped"])
        return batch["image"].numpy()


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` of the indices 0 to length - 1, at equal steps from 0 on."""
    return (np.arange(count) * length // count).tolist()
