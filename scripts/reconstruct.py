"""Reconstruct validation images with the tokenizer, which limits the quality of any generator on its tokens.

    python scripts/reconstruct.py config=configs/rear_b.yaml experiment.output_dir=outputs/tokenizer \\
        dataset.params.eval_shards_path_or_url="imagenet-val-{000000..000049}.tar"

Takes centre crops of the first `sampling.num_fid_samples` validation images, or of all if there are fewer. Classes are
interleaved (image i has class i mod C while every class lasts); `sampling.seed` fixes the order within a class.

Writes to `experiment.output_dir`: reference.npz and reconstructions.npz (arr_0: uint8 NHWC images, arr_1: int64 labels,
both in the same order), reconstruct.json (crop, PSNR, L1, codebook use and the provenance; images with a different
provenance are not replaced) and reconstructions.png (originals above reconstructions). Then compute rFID with

    python evaluation/evaluator.py outputs/tokenizer/reference.npz outputs/tokenizer/reconstructions.npz
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.schema import Config

READS = {
    "experiment": "output_dir tokenizer_checkpoint",
    "model.vq_model": "all",
    "dataset.params": "all but eval_pretokenization verify_hashes",
    "dataset.preprocessing": "crop_size resize_shorter_edge background exif_orientation",
    "training": "enable_tf32",
    "sampling": "num_fid_samples per_gpu_batch_size seed uint8_rule",
}

if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(Config, __doc__, READS)

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.batch_sampler import permutation_of_pass
from data.images.reading import allowed_bad_fraction
from data.loading import Batches
from data.validation_data import open_validation_images
from evaluation.reconstruction import ReconstructionMetrics
from modeling.loading import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import input_errors_exit
from utils.files.lock import only_writer
from utils.files.npz import NpzEntry, write_npz
from utils.files.provenance import is_made, write_record
from utils.images import make_grid, to_float, to_uint8, write_png
from utils.precision import matmul_precision
from utils.run.run_environment import code_facts

GRID_COLUMNS, GRID_ROWS = 16, 4  # a row of originals and the row of their reconstructions count as one


def main(config: Config) -> None:
    with only_writer(Path(config.experiment.output_dir), inside=True):
        reconstruct_all(config)


def reconstruct_all(config: Config) -> None:
    """Write the files of `experiment.output_dir`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config).to(device)
    if not tokenizer.has_images:
        raise tokenizer.no_images("reconstructions")
    validation = ValidationImages(config)
    output_dir = Path(config.experiment.output_dir)
    reference = output_dir / "reference.npz"
    reconstructions = output_dir / "reconstructions.npz"
    record = output_dir / "reconstruct.json"
    provenance = provenance_of(config, validation, tokenizer)
    is_made(reference, provenance, record)
    is_made(reconstructions, provenance, record)
    write_record(reconstructions, provenance, record)
    metrics = ReconstructionMetrics(tokenizer.codebook_size)
    write_images(reference, (images.numpy() for images in validation), validation, tokenizer.resolution)
    with matmul_precision(config.training.enable_tf32):
        batches = reconstruct(tokenizer, validation, metrics, config.sampling.uint8_rule)
        write_images(reconstructions, batches, validation, tokenizer.resolution)
    save_grid(reference, reconstructions, output_dir / "reconstructions.png")
    preprocessing = config.dataset.preprocessing
    crop = f"ADM centre crop of {preprocessing.crop_size} px, shorter edge {preprocessing.resize_shorter_edge} px"
    summary = metrics.summary()
    write_record(reconstructions, provenance, record, figures={"crop": crop, **summary, **code_facts()})
    print(f"{output_dir}: {crop}; " + ", ".join(f"{name} {value:.4g}" for name, value in summary.items()))


def provenance_of(config: Config, validation: "ValidationImages", tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the images depend on, with names and classes of the validation images, not their content."""
    return {
        "held-out images": validation.dataset.fingerprint,
        "number of images": len(validation.labels),
        "sampling.seed": config.sampling.seed,
        "sampling.uint8_rule": config.sampling.uint8_rule,
        "dataset.preprocessing": dataclasses.asdict(config.dataset.preprocessing),
        "sha256 of experiment.tokenizer_checkpoint": tokenizer.sha256(),
    }


def write_images(path: Path, batches: Iterable[np.ndarray], validation: "ValidationImages", resolution: int) -> None:
    """Write an npz of all images, from batches (B, H, W, 3) uint8, and their labels."""
    labels = validation.labels
    shape = (len(labels), resolution, resolution, 3)
    progress = tqdm(batches, desc=path.name, total=len(validation), unit="batch")
    entries: dict[str, NpzEntry] = {
        "arr_0": (shape, np.uint8, progress),
        "arr_1": (labels.shape, np.int64, [labels]),
    }
    write_npz(path, entries)


class ValidationImages:
    """Batches of the images to reconstruct, uint8 (B, H, W, 3); each iteration reads them again.

    Attributes:
        labels: (n,) int64, of the images in their order; class ids as in the training data.

    Raises InputError without images, or for too many unreadable ones or a class that the training data lack.
    """

    def __init__(self, config: Config) -> None:
        params, sampling = config.dataset.params, config.sampling
        self.dataset = open_validation_images(config)
        self.batch_size = sampling.per_gpu_batch_size
        self.num_workers = params.num_workers_per_gpu
        class_ids = self.dataset.source.class_ids
        order = interleave_classes(permutation_of_pass(len(class_ids), sampling.seed, dataset_pass=0), class_ids)
        if allowed_bad_fraction(params) > 0:  # the number of images must be known before writing: read all once
            order = interleave_classes(order[~self._unreadable(order)], class_ids)
        self.order = order[: sampling.num_fid_samples]
        self.labels = class_ids[self.order].astype(np.int64)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches(self.order):
            self.dataset.skipped.add(batch["index"], batch["skipped"])
            yield batch["image"]

    def _batches(self, order: np.ndarray) -> Batches:
        starts = range(0, len(order), self.batch_size)
        items = [order[start : start + self.batch_size].tolist() for start in starts]
        return Batches(self.dataset, items, self.num_workers)

    def _unreadable(self, order: np.ndarray) -> np.ndarray:
        """Whether each image is unreadable, (n,) bool."""
        found = []
        for batch in self._batches(order):
            self.dataset.skipped.add(batch["index"], batch["skipped"])
            found.append(batch["skipped"].numpy())
        return np.concatenate(found)


def interleave_classes(order: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """Reorder the indices `order` (n,): the first image of each class, the second of each class, ..."""
    order = order[np.argsort(class_ids[order], kind="stable")]  # grouped by class
    grouped = class_ids[order]
    rank_in_class = np.arange(len(grouped)) - np.searchsorted(grouped, grouped)
    return order[np.argsort(rank_in_class, kind="stable")]


@torch.inference_mode()
def reconstruct(
    tokenizer: Tokenizer, batches: Iterable[Tensor], metrics: ReconstructionMetrics, uint8_rule: str
) -> Iterator[np.ndarray]:
    """Yield batches of reconstructions (B, H, W, 3) uint8 and update `metrics`."""
    device = next(tokenizer.parameters()).device
    for pixels in batches:
        images = to_float(pixels.to(device))
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        metrics.update(images, reconstructions, codes)
        yield to_uint8(reconstructions, uint8_rule)


def save_grid(reference: Path, reconstructions: Path, picture: Path) -> None:
    """The first images of both files, in rows of originals above rows of reconstructions."""
    files = [np.load(path)["arr_0"][: GRID_ROWS * GRID_COLUMNS] for path in (reference, reconstructions)]
    starts = range(0, len(files[0]), GRID_COLUMNS)
    rows = [images[start : start + GRID_COLUMNS] for start in starts for images in files]
    write_png(picture, make_grid(np.concatenate(rows), min(GRID_COLUMNS, len(rows[0]))))


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
