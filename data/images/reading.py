"""Images with class ids for a DataLoader, from tar shards or from a folder per class."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, default_collate

from data.batch_sampler import Visit, as_visit
from data.images.image_folder import ImageFolder
from data.images.image_source import ImageSource
from data.images.tar_shards import TarShards
from data.images.transforms import Transform
from utils.errors import InputError
from utils.randomness import Stream, philox


def open_images(path: str, num_classes: int | None = None) -> ImageSource:
    """Open webdataset shards (a path, "a-{000..252}.tar" or a glob) or a folder with a sub-folder per class.

    Args:
        num_classes: number of classes of the model that will read the class ids, if there is one.

    Raises:
        InputError: nothing there, something damaged, or a class id out of range; the message names file and sample.
    """
    source = ImageFolder(Path(path)) if Path(path).is_dir() else TarShards(path)
    largest = int(source.class_ids.argmax())
    for limit, meaning in ((num_classes, "num_classes"), (len(source.class_names or []) or None, "class names")):
        if limit is not None and source.class_ids[largest] >= limit:
            raise InputError(
                f"{source.location(largest)}: found class id {source.class_ids[largest]}, "
                f"expected less than {limit} ({meaning})"
            )
    return source


class ImageDataset(Dataset):
    """Transformed images of a source.

    An item is asked for by index or, by `GlobalBatchSampler`, by `Visit(index, pass_number)`. Its augmentation depends
    on (seed, pass number, index) only; a plain index is pass 0.

    Args:
        skip_bad: the next image that can be decoded takes the place of one that cannot.
    """

    collate = staticmethod(default_collate)

    def __init__(self, source: ImageSource, transform: Transform, seed: int, skip_bad: bool = False) -> None:
        self.source, self.transform, self.seed, self.skip_bad = source, transform, seed, skip_bad

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __getitem__(self, item: int | Visit) -> dict[str, Any]:
        """
        Returns:
            image: what the transform gives, for training float32 (3, H, W) in [0, 1]; class_labels and index: int;
            is_bad: bool, another image is in the place of this one.

        Raises:
            InputError: the image cannot be read or decoded.
        """
        index, pass_number = as_visit(item)
        image, class_id, is_bad = self._readable(index)
        rng = np.random.Generator(philox(Stream.AUGMENTATION, self.seed, pass_number * len(self) + index))
        return {"image": self.transform(image, rng), "class_labels": class_id, "index": index, "is_bad": is_bad}

    def _readable(self, index: int) -> tuple[Image.Image, int, bool]:
        for there in range(index, index + len(self)):
            try:
                return *self.source[there % len(self)], there != index
            except InputError:
                if not self.skip_bad:
                    raise
        raise InputError(f"{self.source.location(index)}: cannot be decoded, nor can any other image")
