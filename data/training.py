"""The training data of a config and its batches."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batch_sampler import GlobalBatchSampler
from data.images import ImageDataset, open_images
from data.token_store import open_tokens
from data.transforms import training_transform
from utils.errors import InputError
from utils.schema import Config
from utils.signals import ignore_stop_signals


def open_training_data(config: Config) -> Dataset:
    """Codes if the config names some, else images. Both have a `fingerprint` that tells other data."""
    params, model = config.dataset.params, config.model
    if params.pretokenization is not None:
        generator = model.generator
        return open_tokens(
            Path(params.pretokenization),
            model.vq_model.codebook_size,
            generator.image_seq_len,
            generator.condition_num_classes,
            max_bad_fraction=params.max_bad_fraction if params.on_bad_sample == "skip" else 0.0,
        )
    if params.train_shards_path_or_url is None:
        raise InputError("dataset.params: give pretokenization (codes) or train_shards_path_or_url (images)")
    return ImageDataset(
        open_images(params.train_shards_path_or_url, model.generator.condition_num_classes),
        training_transform(config.dataset.preprocessing),
        config.training.seed,
    )


def check_training_data(config: Config) -> int:
    """Open the data, converting a jsonl that is new, and with `dataset.params.verify_hashes` read all codes.

    Returns:
        Number of samples.

    Raises:
        InputError: something is missing, damaged or does not fit the model.
    """
    dataset = open_training_data(config)
    if config.dataset.params.verify_hashes and config.dataset.params.pretokenization is not None:
        dataset.verify()
    return len(dataset)


def training_batches(
    dataset: Dataset, batch_sampler: GlobalBatchSampler, config: Config, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of a rank on its device: `class_labels`, `index` and `codes` or `image`."""
    loader = DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=config.dataset.params.num_workers_per_gpu,
        collate_fn=dataset.collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )
    for batch in loader:
        yield {key: values.to(device, non_blocking=True) for key, values in batch.items()}
