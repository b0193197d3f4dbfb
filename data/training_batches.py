"""The training data of a config and its batches."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.batch_sampler import GlobalBatchSampler
from data.codes.token_store import TokenStore, open_tokens
from data.images.reading import ImageDataset, open_images
from data.images.transforms import training_transform
from utils.errors import InputError
from utils.ranks import World
from utils.run.signals import ignore_stop_signals
from utils.schedules import schedule_warnings
from utils.schema import Config

TrainingSet = TokenStore | ImageDataset


def open_training_data(config: Config, tokenizer_sha256: str, verify: bool) -> TrainingSet:
    """Codes if the config names some, else images. Both have a `fingerprint` that tells other data.

    Args:
        tokenizer_sha256: of the weights of the tokenizer that the model is trained for.
        verify: read all codes and compare them with the hashes of their store, if `dataset.params.verify_hashes`.

    Raises:
        InputError: something is missing, damaged or does not fit the model or the tokenizer.
    """
    params = config.dataset.params
    if params.pretokenization is not None:
        store = open_codes(config)
        check_tokenizer(store, tokenizer_sha256)
        if verify and params.verify_hashes:
            store.verify()
        return store
    if params.train_shards_path_or_url is None:
        raise InputError("dataset.params: give pretokenization (codes) or train_shards_path_or_url (images)")
    return ImageDataset(
        open_images(params.train_shards_path_or_url, config.model.generator.condition_num_classes),
        training_transform(config.dataset.preprocessing),
        config.training.seed,
        skip_bad=params.on_bad_sample == "skip",
    )


def open_codes(config: Config) -> TokenStore:
    """The codes of `dataset.params.pretokenization`; a jsonl that is new is converted."""
    params, generator = config.dataset.params, config.model.generator
    assert params.pretokenization is not None
    return open_tokens(
        Path(params.pretokenization),
        config.model.vq_model.codebook_size,
        generator.image_seq_len,
        generator.condition_num_classes,
        max_bad_fraction=params.max_bad_fraction if params.on_bad_sample == "skip" else 0.0,
    )


def check_tokenizer(store: TokenStore, tokenizer_sha256: str) -> None:
    """
    Raises:
        InputError: the codes are known to be of a tokenizer with other weights.
    """
    found = store.meta.tokenizer_sha256
    if found not in (None, tokenizer_sha256):
        raise InputError(
            f"{store.path}: made by a tokenizer of sha256 {found[:12]}..., expected that of "
            f"experiment.tokenizer_checkpoint, {tokenizer_sha256[:12]}..."
        )


def describe_length(config: Config, global_batch_size: int, num_samples: int) -> list[str]:
    """Lines for the log: how long the whole run is, and which schedules do not end within it. An epoch is told in
    images, and a sample may be one crop of many."""
    steps, epoch = config.training.max_train_steps, config.experiment.max_train_examples
    images = steps * global_batch_size
    passes = f"{images / num_samples:.4g} dataset passes"
    return [f"{steps} steps are {images / epoch:.4g} epochs of {epoch} images, {passes}", *schedule_warnings(config)]


def passes_done(config: Config, samples_seen: int, num_samples: int) -> dict[str, float]:
    """For the log: `epoch` in images, `dataset_passes` in samples."""
    return {
        "epoch": samples_seen / config.experiment.max_train_examples,
        "dataset_passes": samples_seen / num_samples,
    }


class TrainingBatches:
    """Iterates over the batches of a rank, on its device: `class_labels`, `index` and `codes` or `image`.

    Args:
        micro_steps: batches per step.
        steps: numbers of the steps to come.
        samples_seen: of all ranks, before these steps.

    Attributes:
        num_skipped: visits of images that could not be decoded, by this rank since its start.

    Raises:
        InputError: more different images than `dataset.params.max_bad_fraction` allows cannot be decoded.
    """

    def __init__(
        self, dataset: TrainingSet, config: Config, world: World, micro_steps: int, steps: range, samples_seen: int
    ) -> None:
        batch_sampler = GlobalBatchSampler(
            num_samples=len(dataset),
            per_gpu_batch_size=config.training.per_gpu_batch_size,
            gradient_accumulation_steps=micro_steps,
            rank=world.rank,
            world_size=world.size,
            seed=config.training.seed,
            first_step=steps.start,
            last_step=steps.stop,
            samples_seen=samples_seen,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=config.dataset.params.num_workers_per_gpu,
            collate_fn=dataset.collate,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )
        self.dataset, self.device, self.num_skipped = dataset, world.device, 0
        self.max_bad_fraction = config.dataset.params.max_bad_fraction
        self._batches = iter(loader)
        self._bad_images: set[int] = set()

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        if "is_bad" in batch:
            self._count(batch["index"][batch.pop("is_bad")].tolist())
        return {key: values.to(self.device, non_blocking=True) for key, values in batch.items()}

    def skipped(self, world: World) -> dict[str, int]:
        """For the log: `num_skipped` of all ranks."""
        return {"skipped_images": int(world.sum(torch.tensor(self.num_skipped)))}

    def _count(self, bad_images: list[int]) -> None:
        assert isinstance(self.dataset, ImageDataset), "codes are never bad"
        for index in bad_images:
            self.num_skipped += 1
            if index not in self._bad_images:
                self._bad_images.add(index)
                warnings.warn(f"left out {self.dataset.source.location(index)}: cannot be decoded", stacklevel=3)
        if len(self._bad_images) > self.max_bad_fraction * len(self.dataset):
            raise InputError(
                f"{len(self._bad_images)} of {len(self.dataset)} images cannot be decoded, expected at most "
                f"dataset.params.max_bad_fraction={self.max_bad_fraction}: "
                f"{self.dataset.source.location(min(self._bad_images))}"
            )
