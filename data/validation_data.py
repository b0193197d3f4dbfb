"""Held-out data: codes or images that training does not see, in batches that the ranks share.

Legend: B samples, N codes each, M images, H x W pixels.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from data.codes.token_store import TokenStore
from data.images.image_io import ImageDecoding, Note
from data.images.notices import check_bad
from data.images.reading import ImageDataset, allowed_bad_fraction, open_images
from data.images.transforms import training_transform
from data.loading import Batch, Batches, on_device
from data.training_batches import TrainingSet, check_tokenizer, open_codes, training_classes
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.schema import Config

MAX_IMAGES = 10_000  # of which a Frechet distance knows the features


def open_validation_data(config: Config, tokenizer_sha256: str, verify: bool = True) -> TrainingSet | None:
    """The codes of `dataset.params.eval_pretokenization`, or else centre crops of `eval_shards_path_or_url`; None if
    neither is given or `experiment.eval_every` is 0.

    Args:
        tokenizer_sha256: of the weights of the tokenizer that the model is trained for.
        verify: read all codes and compare them with the hashes of their store, if `dataset.params.verify_hashes`.

    Raises:
        InputError: something is missing, damaged or does not fit the model, the tokenizer or the training classes.
    """
    params = config.dataset.params
    if config.experiment.eval_every == 0:
        return None
    if params.eval_pretokenization is not None:
        store = open_codes(config, "eval_pretokenization")
        check_tokenizer(store, tokenizer_sha256)
        _check_class_names(store, config)
        if verify and params.verify_hashes:
            store.verify()
        return store
    if params.eval_shards_path_or_url is not None:
        try:
            return open_validation_images(config, config.model.generator.condition_num_classes)
        except InputError as error:
            raise InputError(f"held-out images (experiment.eval_every=0 goes without): {error}") from error
    return None


def open_validation_images(config: Config, num_classes: int | None = None) -> ImageDataset:
    """`open_center_crops`, with the class ids of the training data.

    Raises:
        InputError: as there, or a class that training does not know.
    """
    images, known = open_center_crops(config, num_classes), training_classes(config)
    if known is not None:
        images.source.name_classes(*known)
    return images


def open_center_crops(config: Config, num_classes: int | None = None) -> ImageDataset:
    """A centre crop of each image of `dataset.params.eval_shards_path_or_url`, never mirrored.

    Raises:
        InputError: the key is missing, or what it names, or a class id is not below `num_classes`.
    """
    params, preprocessing = config.dataset.params, config.dataset.preprocessing
    if params.eval_shards_path_or_url is None:
        raise InputError("dataset.params.eval_shards_path_or_url: missing; give tar shards or a folder per class")
    transform = training_transform(replace(preprocessing, random_crop=False, random_flip=False))
    source = open_images(params.eval_shards_path_or_url, num_classes, ImageDecoding.of(preprocessing))
    return ImageDataset(source, transform, 0, allowed_bad_fraction(params))


def _check_class_names(store: TokenStore, config: Config) -> None:
    """
    Raises:
        InputError: the class ids of the store mean other classes than those of the training data.
    """
    found, known = store.meta.class_names, training_classes(config)
    if found is not None and known is not None and found != known[0]:
        raise InputError(
            f"dataset.params.eval_pretokenization: found other class names in {store.path} than in {known[1]}, "
            "expected those of the training data in their order"
        )


def validation_batches(dataset: TrainingSet, config: Config, ctx: DistributedContext) -> Iterator[Batch]:
    """Batches of `training.per_gpu_batch_size` in the order of the data, dealt to the ranks, on their
    devices; all of them read to the end. Rank 0 shows its progress.

    Yields:
        index and class_labels (B,) and codes (B, N), or image (B, 3, H, W) and readable (B,) bool: false where another
        image is in the place of one that cannot be decoded.

    Raises:
        InputError: the ranks have other data, or too many images cannot be decoded.
        Exception: what `Batches` raises.
    """
    ctx.assert_same_on_all_ranks("held-out data", {"fingerprint": dataset.fingerprint})
    size = config.training.per_gpu_batch_size
    starts = range(0, len(dataset), size)[ctx.rank :: ctx.size]
    items = [list(range(start, min(start + size, len(dataset)))) for start in starts]
    batches = Batches(dataset, items, config.dataset.params.num_workers_per_gpu)
    silent = None if ctx.is_rank0 else True  # None: without a terminal
    progress = tqdm(batches, "held-out data", len(items), unit="batch", disable=silent, delay=2)
    if isinstance(dataset, TokenStore):
        yield from (on_device(batch, ctx.device) for batch in progress)
        return
    unreadable = torch.zeros(len(dataset), dtype=torch.int32)
    for batch in progress:
        dataset.notes.add(batch["index"], batch["notes"])
        batch["readable"] = batch.pop("notes") & Note.UNREADABLE == 0
        unreadable[batch["index"]] = (~batch["readable"]).int()
        yield on_device(batch, ctx.device)
    bad = ctx.all_reduce_sum(unreadable).nonzero()[:, 0].tolist()
    check_bad(dataset.source, set(bad), dataset.notes.max_bad_fraction)
    dataset.notes.summary()


class ValidationPixels:
    """Bytes of held-out images: of all, or of 10,000 at equal steps in the data. In the place of an image that cannot
    be decoded is the next one."""

    def __init__(self, config: Config) -> None:
        self.dataset = open_center_crops(config)
        count = min(len(self.dataset), MAX_IMAGES)
        self.indices = (np.arange(count) * len(self.dataset) // count).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, uint8 (stop - start, H, W, 3)."""
        with ThreadPoolExecutor() as threads:
            batch = self.dataset.collate(list(threads.map(self.dataset.__getitem__, self.indices[start:stop])))
        self.dataset.notes.add(batch["index"], batch["notes"])
        return batch["image"].numpy()
