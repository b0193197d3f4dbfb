"""Validation data: codes or images that training does not see, in batches that the ranks share.

Legend: B samples, N codes each, H x W pixels.
"""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from data.codes.token_store import TokenStore
from data.images.image_io import ImageDecoding
from data.images.notices import check_unreadable
from data.images.reading import CroppedImages, ImageDataset, allowed_bad_fraction, evenly_spaced, open_images
from data.images.shard_cache import ShardCache
from data.images.transforms import center_crop_transform
from data.loading import Batch, Batches, on_device
from data.training_batches import check_tokenizer, open_codes, training_classes
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.schema import Config

ValidationSet = TokenStore | ImageDataset
MAX_IMAGES = 10_000  # whose features a Frechet distance is computed from


def open_validation_data(config: Config, tokenizer_sha256: str, verify: bool = True) -> ValidationSet | None:
    """The codes of `dataset.params.eval_pretokenization`, else centre crops of `eval_shards_path_or_url`; None without
    either, or if `experiment.eval_every` is 0.

    Args:
        tokenizer_sha256: hash of the weights of the model's tokenizer.
        verify: compare all codes with the hashes of their store, if `dataset.params.verify_hashes`.

    Raises:
        InputError: data are missing, damaged or do not match the model, the tokenizer or the training classes.
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
            raise InputError(f"validation images (experiment.eval_every=0: no validation): {error}") from error
    return None


def open_validation_images(
    config: Config, num_classes: int | None = None, trained: list[str] | None = None
) -> ImageDataset:
    """`open_center_crops`, with the class ids of the training data; raises InputError for other classes.

    Args:
        num_classes: number of classes of the model, if there is one.
        trained: class names that its weights record, in the order of the ids; None: use the training data's.
    """
    images = open_center_crops(config)
    known = training_classes(config) if trained is None else (trained, "the weights")
    if known is not None:
        class_names, origin = known
        images.source.name_classes(class_names, origin)
    images.source.check_class_ids(num_classes)
    return images


def open_center_crops(config: Config) -> ImageDataset:
    """A centre crop of each image of `dataset.params.eval_shards_path_or_url`, never mirrored; see `open_images`."""
    params, preprocessing = config.dataset.params, config.dataset.preprocessing
    if params.eval_shards_path_or_url is None:
        raise InputError("dataset.params.eval_shards_path_or_url: missing; give tar shards or a folder per class")
    transform = center_crop_transform(preprocessing)
    source = open_images(
        params.eval_shards_path_or_url, decoding=ImageDecoding.of(preprocessing), cache=ShardCache.of(params)
    )
    return ImageDataset(source, transform, seed=0, max_bad_fraction=allowed_bad_fraction(params))


def _check_class_names(store: TokenStore, config: Config) -> None:
    found = store.meta.class_names
    known = training_classes(config)
    if found is not None and known is not None and found != known[0]:
        raise InputError(
            f"dataset.params.eval_pretokenization: found other class names in {store.path} than in {known[1]}, "
            "expected the same names in the same order"
        )


def validation_batches(dataset: ValidationSet, config: Config, ctx: DistributedContext) -> Iterator[Batch]:
    """Batches of `training.per_gpu_batch_size` in the order of the data, distributed over the ranks, on their devices.
    All ranks must read to the end. Rank 0 shows its progress.

    Yields:
        index and class_labels (B,) and codes (B, N), or image (B, 3, H, W) and readable (B,) bool: false where another
        image replaces an unreadable one.

    Raises InputError if the ranks have different data or too many images cannot be decoded, and the errors of
    `Batches`.
    """
    ctx.assert_same_on_all_ranks("validation data", {"fingerprint": dataset.fingerprint})
    size = config.training.per_gpu_batch_size
    starts = range(0, len(dataset), size)[ctx.rank :: ctx.size]
    items = [list(range(start, min(start + size, len(dataset)))) for start in starts]
    batches = Batches(dataset, items, config.dataset.params.num_workers_per_gpu)
    silent = None if ctx.is_rank0 else True  # None: without a terminal
    progress = tqdm(batches, "validation data", len(items), unit="batch", disable=silent, delay=2)
    if isinstance(dataset, TokenStore):
        yield from (on_device(batch, ctx.device) for batch in progress)
        return
    unreadable = torch.zeros(len(dataset), dtype=torch.int32)
    for batch in progress:
        skipped = batch.pop("skipped")
        dataset.skipped.add(batch["index"], skipped)
        unreadable[batch["index"]] = skipped.int()
        batch["readable"] = ~skipped
        yield on_device(batch, ctx.device)
    bad = ctx.all_reduce_sum(unreadable).nonzero()[:, 0].tolist()
    check_unreadable(dataset.source, set(bad), dataset.skipped.max_bad_fraction)


class ValidationPixels(CroppedImages):
    """Validation images: all, or 10,000 at equal steps. Unreadable images are replaced by the next readable one."""

    def __init__(self, config: Config) -> None:
        dataset = open_center_crops(config)
        super().__init__(dataset, evenly_spaced(len(dataset), min(len(dataset), MAX_IMAGES)))
