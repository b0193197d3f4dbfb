"""Reconstruct held-out images with the tokenizer: what it loses is lost to every generator on its codes.

    python scripts/reconstruct.py config=configs/rear_b.yaml experiment.output_dir=outputs/tokenizer \\
        dataset.params.eval_shards_path_or_url="imagenet-val-{000000..000049}.tar"

Takes centre crops of the first `sampling.num_fid_samples` held-out images, or of all if there are fewer. The classes
take turns (image i has class i mod C while every class lasts), in an order within the class that `sampling.seed` fixes.

Writes to `experiment.output_dir`: reference.npz and reconstructions.npz (arr_0: uint8 NHWC images, arr_1: int64 labels,
both in the same order), reconstruct.json (crop, PSNR, L1, codebook use, and what the images were made from: those made
otherwise are not replaced) and reconstructions.png (originals above reconstructions). The rFID of the tokenizer is then

    python evaluation/evaluator.py outputs/tokenizer/reference.npz outputs/tokenizer/reconstructions.npz
"""

import sys
from pathlib import Path

READS = (
    *("experiment.output_dir", "experiment.tokenizer_checkpoint", "model.vq_model"),
    *("dataset.params.eval_shards_path_or_url", "dataset.params.num_workers_per_gpu"),
    *("dataset.params.train_shards_path_or_url", "dataset.params.pretokenization", "training.enable_tf32"),
    *("dataset.params.on_bad_sample", "dataset.params.max_bad_fraction"),
    *(f"dataset.preprocessing.{key}" for key in ("resize_shorter_edge", "crop_size", "background", "exif_orientation")),
    *("sampling.num_fid_samples", "sampling.per_gpu_batch_size", "sampling.seed", "sampling.uint8_rule"),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit

    CONFIG = load_config_or_exit(__doc__, READS)

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
from modeling.tokenizers.registry import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config
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
    """The files of `experiment.output_dir`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config).to(device)
    if not tokenizer.has_images:
        raise tokenizer.no_images("reconstructions")
    validation = HeldoutImages(config)
    output_dir = Path(config.experiment.output_dir)
    results = [output_dir / f"{name}.npz" for name in ("reference", "reconstructions")]
    made_from, record = origin(config, validation, tokenizer), output_dir / "reconstruct.json"
    for result in results:
        is_made(result, made_from, record)
    write_record(results[-1], made_from, record)
    metrics = ReconstructionMetrics(tokenizer.codebook_size)
    streams = [
        (images.numpy() for images in validation),
        reconstruct(tokenizer, validation, metrics, config.sampling.uint8_rule),
    ]
    labels = validation.labels
    shape = (len(labels), tokenizer.resolution, tokenizer.resolution, 3)
    for result, chunks in zip(results, streams, strict=True):
        progress = tqdm(chunks, desc=result.name, total=len(validation), unit="batch")
        entries: dict[str, NpzEntry] = {
            "arr_0": (shape, np.uint8, progress),
            "arr_1": (labels.shape, np.int64, [labels]),
        }
        with matmul_precision(config.training.enable_tf32):  # of what `reconstruct` computes as it is read
            write_npz(result, entries)
    save_grid(output_dir)
    preprocessing, summary = config.dataset.preprocessing, metrics.summary()
    crop = f"ADM centre crop of {preprocessing.crop_size} px, shorter edge {preprocessing.resize_shorter_edge} px"
    write_record(results[-1], made_from, record, {"crop": crop, **summary, **code_facts()})
    print(f"{output_dir}: {crop}; " + ", ".join(f"{name} {value:.4g}" for name, value in summary.items()))


def origin(config: Config, validation: "HeldoutImages", tokenizer: Tokenizer) -> dict[str, Any]:
    """What the images depend on; of the held-out ones names and classes, for their contents are read each time."""
    return {
        "held-out images": validation.dataset.fingerprint,
        "number of images": len(validation.labels),
        "sampling.seed": config.sampling.seed,
        "sampling.uint8_rule": config.sampling.uint8_rule,
        "dataset.preprocessing": dataclasses.asdict(config.dataset.preprocessing),
        "sha256 of experiment.tokenizer_checkpoint": tokenizer.sha256(),
    }


class HeldoutImages:
    """Batches of the images to reconstruct, uint8 (B, H, W, 3), as often as they are asked for.

    Attributes:
        labels: (n,) int64, of the images in their order; class ids are those of the training data.

    Raises:
        InputError: no images given, too many that cannot be read, or a class that training does not know.
    """

    def __init__(self, config: Config) -> None:
        params, sampling = config.dataset.params, config.sampling
        self.dataset = open_validation_images(config)
        source = self.dataset.source
        self.batch_size, self.num_workers = sampling.per_gpu_batch_size, params.num_workers_per_gpu
        shuffled = permutation_of_pass(len(source), sampling.seed, dataset_pass=0)
        order = by_turns(shuffled, source.class_ids)
        if allowed_bad_fraction(params) > 0:  # their number must be known before the files are begun: read all
            order = by_turns(order[~self._unreadable(order)], source.class_ids)
        self.order = order[: sampling.num_fid_samples]
        self.labels = source.class_ids[self.order].astype(np.int64)

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
        """(n,) bool."""
        found = []
        for batch in self._batches(order):
            self.dataset.skipped.add(batch["index"], batch["skipped"])
            found.append(batch["skipped"].numpy())
        return np.concatenate(found)


def by_turns(order: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """The indices of `order` (n,): one of each class, another of each class, ..., within a class in their order."""
    order = order[np.argsort(class_ids[order], kind="stable")]  # class by class
    grouped = class_ids[order]
    turn = np.arange(len(grouped)) - np.searchsorted(grouped, grouped)  # rank within the class
    return order[np.argsort(turn, kind="stable")]


@torch.inference_mode()
def reconstruct(
    tokenizer: Tokenizer, batches: Iterable[Tensor], metrics: ReconstructionMetrics, uint8_rule: str
) -> Iterator[np.ndarray]:
    """Yield batches of reconstructions (B, H, W, 3) uint8; figures go to `metrics`."""
    device = next(tokenizer.parameters()).device
    for pixels in batches:
        images = to_float(pixels.to(device))
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        metrics.update(images, reconstructions, codes)
        yield to_uint8(reconstructions, uint8_rule)


def save_grid(output_dir: Path) -> None:
    """The first images of both files, in rows of originals above rows of reconstructions."""
    names = ("reference", "reconstructions")
    files = [np.load(output_dir / f"{name}.npz")["arr_0"][: GRID_ROWS * GRID_COLUMNS] for name in names]
    starts = range(0, len(files[0]), GRID_COLUMNS)
    rows = [images[start : start + GRID_COLUMNS] for start in starts for images in files]
    grid = make_grid(np.concatenate(rows), min(GRID_COLUMNS, len(rows[0])))
    write_png(output_dir / "reconstructions.png", grid)


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
