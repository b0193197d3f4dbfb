"""Stored codes together with the pixels that they were encoded from, for targets that need images.

Legend: B samples, N codes each, K crops per image, H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch_sampler import SampleIndex, as_sample_index
from data.codes.token_store import TokenStore
from data.images.image_source import ImageSource
from data.images.transforms import crop_settings, cut_crops, pretokenize_transform
from utils.errors import InputError
from utils.files.hashing import hash_of
from utils.files.provenance import differences
from utils.schema import PreprocessingConfig


class CodesAndImages(Dataset):
    """The samples of a store of scripts/pretokenize.py, each with its crop: sample i is crop i % K of image i // K.

    Args:
        source: the images that the store was made from, in the same order.
        preprocessing: with the same crops.

    Attributes:
        workers: default number of processes that read it.

    Raises:
        InputError: the store does not record its images, or records other images, other crops, or images left out.
    """

    workers = 12

    def __init__(self, store: TokenStore, source: ImageSource, preprocessing: PreprocessingConfig) -> None:
        self.store = store
        self.source = source
        self.preprocessing = preprocessing
        self.transform = pretokenize_transform(preprocessing)
        self._check()

    def _check(self) -> None:
        meta = self.store.meta
        if meta.source_sha256 is None:
            raise InputError(
                f"{self.store.path}: found no record of the images of these codes, expected a store of "
                "scripts/pretokenize.py; make it from dataset.params.train_shards_path_or_url"
            )
        if meta.source_sha256 != self.source.fingerprint:
            raise InputError(
                f"{self.store.path}: made from images with other keys or classes than those of "
                f"dataset.params.train_shards_path_or_url: found hash {meta.source_sha256[:12]}..., expected "
                f"{self.source.fingerprint[:12]}...; give the images that it was made from"
            )
        if meta.num_skipped:
            raise InputError(
                f"{self.store.path}: found codes without {meta.num_skipped} unreadable images, expected codes of all "
                "images, so that both are in the same order; remove these images and make the store again"
            )
        expected = crop_settings(self.preprocessing)
        found = {key: value for key, value in (meta.settings or {}).items() if key.startswith("dataset.preprocessing.")}
        if different := differences(found=found, expected=expected):
            raise InputError(f"{self.store.path}: made with other crops: {different[0]}; use the same settings")
        assert len(self.store) == len(self.source) * meta.crops_per_image
        assert (self.store.class_ids == self.source.class_ids.repeat(meta.crops_per_image)).all()

    def __len__(self) -> int:
        return len(self.store)

    @property
    def fingerprint(self) -> str:
        return hash_of({"codes": self.store.fingerprint, "images": self.source.fingerprint})

    @property
    def class_names(self) -> list[str] | None:
        return self.store.class_names

    @property
    def class_ids(self) -> np.ndarray:
        """(n,)"""
        return self.store.class_ids

    def __getitems__(self, items: Sequence[int | SampleIndex]) -> dict[str, Tensor]:
        """A batch of the store, and `image`, uint8 (B, H, W, 3). Raises InputError for an unreadable image."""
        batch = self.store.__getitems__(items)
        indices = [as_sample_index(item).index for item in items]
        return batch | {"image": torch.stack([self.crop(index) for index in indices])}

    def crop(self, index: int) -> Tensor:
        """The pixels of a sample, uint8 (H, W, 3)."""
        number, crop = divmod(index, self.store.meta.crops_per_image)
        image = self.transform(self.source.load(number), np.empty(0))  # not random: no draws
        return cut_crops(image[None], self.preprocessing)[0, crop]
