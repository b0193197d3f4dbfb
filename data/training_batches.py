"""The training data of a config and its batches."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch_sampler import GlobalBatchSampler, MicroBatch
from data.codes.store_files import open_store
from data.codes.token_store import TokenStore, open_tokens
from data.codes_and_images import CodesAndImages
from data.images.image_folder import class_folders, class_name
from data.images.image_io import ImageDecoding
from data.images.image_source import ImageSource
from data.images.reading import ImageDataset, allowed_bad_fraction, open_images
from data.images.shard_cache import ShardCache
from data.images.shard_urls import is_url
from data.images.tar_shards import find_shards, has_shards, read_class_names
from data.images.transforms import training_transform
from data.loading import Batch, Batches, on_device, read_batch
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.files.text import same_letters
from utils.randomness import training_uniforms
from utils.run.weights_path import TrainedWeights, check_classes
from utils.schema import Config, DatasetParams, GeneratorConfig

TrainingSet = TokenStore | ImageDataset | CodesAndImages


def open_training_data(
    config: Config, tokenizer_sha256: str, verify: bool, need_images: Sequence[str] = ()
) -> TrainingSet:
    """The codes that the config names, else images; the `fingerprint` differs for different data.

    Args:
        tokenizer_sha256: hash of the weights of the model's tokenizer.
        verify: compare all codes with the hashes of their store, if `dataset.params.verify_hashes`.
        need_images: names of the taps that need images; codes are then read with their images.

    Raises:
        InputError: something is missing, damaged or does not fit the model or the tokenizer.
    """
    params = config.dataset.params
    if params.pretokenization is not None:
        store = open_codes(config)
        check_tokenizer(store, tokenizer_sha256)
        training_classes(config)  # compares the class names
        if verify and params.verify_hashes:
            store.verify()
        if not need_images:
            return store
        if params.train_shards_path_or_url is None:
            raise InputError(
                f"dataset.params.train_shards_path_or_url: missing; the tap {need_images[0]!r} of model.generator.taps "
                "needs the images of the codes"
            )
        return CodesAndImages(store, open_training_images(config), config.dataset.preprocessing)
    if params.train_shards_path_or_url is None:
        raise InputError("dataset.params: give pretokenization (codes) or train_shards_path_or_url (images)")
    return ImageDataset(
        open_training_images(config),
        training_transform(config.dataset.preprocessing),
        config.training.seed,
        allowed_bad_fraction(params),
    )


def open_training_images(config: Config) -> ImageSource:
    """The images of `dataset.params.train_shards_path_or_url`, which must be given."""
    path = config.dataset.params.train_shards_path_or_url
    assert path is not None
    classes = config.model.generator.condition_num_classes
    decoding, cache = ImageDecoding.of(config.dataset.preprocessing), ShardCache.of(config.dataset.params)
    return open_images(path, num_classes=classes, decoding=decoding, cache=cache)


def open_codes(config: Config, key: str = "pretokenization") -> TokenStore:
    """The codes of this key of `dataset.params`, which must be given; a new jsonl is converted."""
    params, generator = config.dataset.params, config.model.generator
    return open_tokens(
        Path(getattr(params, key)),
        config.model.vq_model.codebook_size,
        generator.image_seq_len,
        generator.condition_num_classes,
        allowed_bad_fraction(params),
        f"dataset.params.{key}",
    )


def training_classes(config: Config) -> tuple[list[str], str] | None:
    """Class names of the training data in the order of their ids, and their source: the codes, else the images. None:
    the data have no names. Raises InputError if codes and images have different names."""
    params = config.dataset.params
    images = _image_classes(params)
    store = Path(params.pretokenization).with_suffix(".tokens") if params.pretokenization is not None else None
    names = open_store(store)[0].class_names if store is not None and store.is_dir() else None
    if names is None:
        return None if images is None else (images, str(params.train_shards_path_or_url))
    if images not in (None, names):
        raise InputError(
            f"dataset.params.train_shards_path_or_url={params.train_shards_path_or_url}: found other class names than "
            f"in {store}, expected the same names in the same order; tokenize the images again, or give null"
        )
    return names, str(store)


def _image_classes(params: DatasetParams) -> list[str] | None:
    """Of `train_shards_path_or_url`; of URLs, as far as they are in the cache."""
    images, cache = params.train_shards_path_or_url, ShardCache.of(params)
    if images is None:
        return None
    if is_url(images):
        return None if cache is None else read_class_names(cache.paths_of(images))
    if Path(images).is_dir():
        return list(map(class_name, class_folders(Path(images))))
    return read_class_names(find_shards(images)) if has_shards(images) else None


def known_classes(config: Config, trained: list[str] | None) -> tuple[list[str], str] | None:
    """Class names of a model and their source: the record of its weights, else the training data of the config, which
    is printed."""
    if trained is not None:
        return trained, "the weights"
    found = training_classes(config)
    if found is not None:
        print(f"class names are those of {found[1]}, since the weights record none")
    return found


def asked_classes(config: Config, trained: list[str] | None) -> list[int]:
    """Class ids of `sampling.class_labels`, in that order; raises InputError for an empty list, a repeated or unknown
    id, or a name that none or several classes of the model have.

    `trained`: class names that the weights record; None: the training data's are used, which is printed.
    """
    asked, num_classes = config.sampling.class_labels, config.model.generator.condition_num_classes
    if asked is None:
        return list(range(num_classes))
    names: list[str] = []
    where = "the training data, which have no names"
    if not all(map(str.isdecimal, asked)):
        names, where = known_classes(config, trained) or (names, where)
    class_ids: list[int] = []
    for word in asked:
        same = [same_letters(name) == same_letters(word) for name in names[:num_classes]]
        named = [class_id for class_id, is_same in enumerate(same) if is_same]
        found = [int(word)] if word.isdecimal() else named
        if len(found) > 1:
            raise InputError(
                f"sampling.class_labels: found {word!r}, the name of the classes {found} of {where}; expected an id"
            )
        if not found or found[0] >= num_classes:
            near = difflib.get_close_matches(word, names, 1, 0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            expected = f"0 to {num_classes - 1} or the name of a class of {where}"
            raise InputError(f"sampling.class_labels: found {word!r}, expected {expected}{hint}")
        if found[0] in class_ids:
            raise InputError(f"sampling.class_labels: found class {found[0]} twice, expected each once")
        class_ids += found
    if not class_ids:
        raise InputError("sampling.class_labels=[]: expected at least one class, or null for all")
    return class_ids


def classes_to_sample(config: Config, weights: TrainedWeights) -> list[int]:
    """`asked_classes` of a model; prints a line if classes without training samples are among all classes. Raises
    InputError also for such a class that is named."""
    classes = asked_classes(config, weights.class_names)
    for line in check_classes(weights, asked=None if config.sampling.class_labels is None else classes):
        print(line)
    return classes


def classes_without_samples(dataset: TrainingSet, num_classes: int) -> list[int]:
    """Their ids, of 0 to `num_classes` - 1."""
    has_samples = np.zeros(num_classes, dtype=bool)
    has_samples[dataset.class_ids] = True
    return np.flatnonzero(~has_samples).tolist()


def check_tokenizer(store: TokenStore, tokenizer_sha256: str) -> None:
    """Raise InputError if the codes record a tokenizer with other weights."""
    found = store.meta.tokenizer_sha256
    if found not in (None, tokenizer_sha256):
        raise InputError(
            f"{store.path}: made by a tokenizer of sha256 {found[:12]}..., expected that of "
            f"experiment.tokenizer_checkpoint, {tokenizer_sha256[:12]}..."
        )


def describe_length(config: Config, global_batch_size: int, num_samples: int) -> str:
    """Length of the whole run, for the log. An epoch counts images, and a sample may be one of several crops of an
    image."""
    steps, epoch = config.training.max_train_steps, config.experiment.max_train_examples
    images = steps * global_batch_size
    passes = f"{images / num_samples:.4g} dataset passes"
    return f"{steps} steps are {images / epoch:.4g} epochs of {epoch} images, {passes}"


def passes_done(config: Config, samples_seen: int, num_samples: int) -> dict[str, float]:
    """Progress for the log: epochs in images, passes in samples."""
    return {
        "train/epoch": samples_seen / config.experiment.max_train_examples,
        "train/dataset_passes": samples_seen / num_samples,
    }


class GeneratorBatches(Dataset):
    """Batches with their random numbers and dropped labels, prepared in the workers to keep the GPU busy."""

    def __init__(
        self, dataset: TrainingSet, config: Config, num_perturbation_uniforms: int, num_order_uniforms: int
    ) -> None:
        self.dataset = dataset
        self.workers = dataset.workers
        self.num_perturbation_uniforms = num_perturbation_uniforms
        self.num_order_uniforms = num_order_uniforms
        self.seed = config.training.seed
        self.generator = config.model.generator

    def __getitems__(self, items: MicroBatch) -> Batch:
        batch = read_batch(self.dataset, items)
        uniforms = training_uniforms(
            seed=self.seed,
            step=items.step,
            slots=items.slots,
            num_perturbation=self.num_perturbation_uniforms,
            num_orders=self.num_order_uniforms,
        )
        batch["class_labels"] = drop_class_labels(batch["class_labels"], uniforms.label_dropout, self.generator)
        batch["perturbation_uniforms"] = uniforms.perturbation
        if uniforms.orders is not None:
            batch["order_uniforms"] = uniforms.orders
        return with_distinct_labels(batch)


def drop_class_labels(class_labels: Tensor, uniforms: Tensor, generator: GeneratorConfig) -> Tensor:
    """Replace labels (B,) by the null class where `uniforms` (B,) fall below `class_label_dropout`."""
    return torch.where(uniforms < generator.class_label_dropout, generator.condition_num_classes, class_labels)


def with_distinct_labels(batch: Batch) -> Batch:
    """Replace `class_labels` (B,) by its distinct values (U,), and add `class_rows` (B,): the index of each label."""
    class_labels, class_rows = batch["class_labels"].unique(return_inverse=True)
    return batch | {"class_labels": class_labels, "class_rows": class_rows}


class TrainingBatches:
    """Iterates over the batches of a rank, on its device: `class_labels`, `index` and `codes` or `image`.

    Batches for the generator also have `perturbation_uniforms` and, if needed, `order_uniforms`, some labels are
    dropped, and `class_labels` (U,) are the distinct labels, with each sample's index in `class_rows` (B,).

    Args:
        micro_steps: batches per step.
        steps: numbers of the steps to come.
        samples_seen: samples that all ranks have seen before these steps.
        stop_requested: whether a stop signal has arrived.
        num_uniforms: random numbers for the perturbation of a sample at a step; None: batches for a tokenizer.
        num_order_uniforms: random numbers for the order of a sample.

    Raises InputError if more images cannot be decoded than `dataset.params.max_bad_fraction` allows, and the errors of
    `Batches`.
    """

    def __init__(
        self,
        dataset: TrainingSet,
        config: Config,
        ctx: DistributedContext,
        micro_steps: int,
        steps: range,
        samples_seen: int,
        stop_requested: Callable[[], bool],
        num_uniforms: int | None = None,
        num_order_uniforms: int = 0,
    ) -> None:
        batch_sampler = GlobalBatchSampler(
            num_samples=len(dataset),
            per_gpu_batch_size=config.training.per_gpu_batch_size,
            gradient_accumulation_steps=micro_steps,
            rank=ctx.rank,
            world_size=ctx.size,
            seed=config.training.seed,
            first_step=steps.start,
            last_step=steps.stop,
            samples_seen=samples_seen,
            class_ids=None if num_uniforms is None else dataset.class_ids,
        )
        params, self.device = config.dataset.params, ctx.device
        on_gpu = ctx.device.type == "cuda"
        samples: Dataset = dataset
        if num_uniforms is not None:
            samples = GeneratorBatches(dataset, config, num_uniforms, num_order_uniforms)
        self._batches = Batches(samples, batch_sampler, params.num_workers_per_gpu, on_gpu, stop_requested)
        self.skipped = dataset.skipped if isinstance(dataset, ImageDataset) else None

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        if self.skipped is not None:
            self.skipped.add(batch["index"], batch.pop("skipped"))
        return on_device(batch, self.device)

    @property
    def num_skipped(self) -> int:
        """Number of undecodable images that this rank has skipped since its start."""
        return self.skipped.count if self.skipped is not None else 0
