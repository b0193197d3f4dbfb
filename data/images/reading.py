"""Images with class ids for a DataLoader, from tar shards or from a folder per class."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, default_collate

from data.batch_sampler import SampleIndex, as_sample_index
from data.images.image_folder import ImageFolder
from data.images.image_io import ImageDecoding, Note
from data.images.image_source import ImageSource
from data.images.notices import ImageNotes
from data.images.tar_shards import TarShards
from data.images.transforms import NUM_DRAWS, Transform
from utils.errors import InputError
from utils.randomness import Stream, philox, uniforms
from utils.schema import DatasetParams


def open_images(path: str, num_classes: int | None = None, decoding: ImageDecoding | None = None) -> ImageSource:
    """Open webdataset shards (a path, "a-{000..252}.tar" or a glob) or a folder with a sub-folder per class.

    Args:
        num_classes: number of classes of the model that will read the class ids, if there is one.
        decoding: how files become pixels; None: white behind transparency, EXIF orientation ignored.

    Raises:
        InputError: nothing there, something damaged, or a class id out of range; the message names file and sample.
    """
    source = ImageFolder(Path(path)) if Path(path).is_dir() else TarShards(path)
    source.decoding = decoding or ImageDecoding()
    largest = int(source.class_ids.argmax())
    for limit, meaning in ((num_classes, "num_classes"), (len(source.class_names or []) or None, "class names")):
        if limit is not None and source.class_ids[largest] >= limit:
            raise InputError(
                f"{source.location(largest)}: found class id {source.class_ids[largest]}, "
                f"expected less than {limit} ({meaning})"
            )
    return source


def allowed_bad_fraction(params: DatasetParams) -> float:
    """Share of bad samples that may be left out; 0: none."""
    return params.max_bad_fraction * (params.on_bad_sample == "skip")


class ImageDataset(Dataset):
    """Transformed images of a source.

    Items are indexed by a plain index (pass 0) or by `SampleIndex(index, dataset_pass)`, as `GlobalBatchSampler` does.
    Augmentation depends on (seed, dataset pass, index) only.

    Args:
        max_bad_fraction: if above 0, the next image that can be read takes the place of one that cannot; more of these
            than this share of all are an error, once `notes` hears of them.

    Attributes:
        workers: processes that read it, by default.
        notes: what this process was told about the images; who asks for batches hands on their `index` and `notes`.
    """

    collate = staticmethod(default_collate)
    workers = 12

    def __init__(self, source: ImageSource, transform: Transform, seed: int, max_bad_fraction: float = 0.0) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.notes = ImageNotes(source, max_bad_fraction)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def class_ids(self) -> np.ndarray:
        """(num_images,)"""
        return self.source.class_ids

    def __getitem__(self, item: int | SampleIndex) -> dict[str, Any]:
        """
        Returns:
            image: what the transform gives, uint8 (H, W, 3); class_labels and index: int;
            notes: int, the bits of `Note`; with UNREADABLE, another image and its label are in the place of this one.

        Raises:
            InputError: the image cannot be read or decoded.
        """
        index, dataset_pass = as_sample_index(item)
        image, there, note = self._readable(index)
        draws = uniforms(philox(Stream.AUGMENTATION, self.seed, dataset_pass * len(self) + index), NUM_DRAWS)
        class_id = int(self.source.class_ids[there])
        return {"image": self.transform(image, draws), "class_labels": class_id, "index": index, "notes": int(note)}

    def _readable(self, index: int) -> tuple[Image.Image, int, Note]:
        for step in range(len(self)):
            there = (index + step) % len(self)
            try:
                image, note = self.source.load(there)
                return image, there, note if there == index else Note.UNREADABLE
            except InputError:
                if not self.notes.max_bad_fraction:
                    raise
        raise InputError(f"{self.source.location(index)}: cannot be decoded, nor can any other image")
