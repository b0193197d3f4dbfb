"""Inspect tokenized images: decode some to a grid with their class names, and count all codes.

    python scripts/inspect_codes.py config=configs/rear_b.yaml experiment.output_dir=outputs/codes
    python scripts/inspect_codes.py config=configs/rear_b.yaml experiment.output_dir=outputs/codes \\
        inspection.rows=[0,1,2,12811660]

Reads the codes of `dataset.params.pretokenization` and decodes the samples `inspection.rows`, or random ones, with
`experiment.tokenizer_checkpoint`.

Prints the statistics. Writes to `experiment.output_dir`: codes.png (the grid; not for a tokenizer without a decoder),
statistics.png (how often codes and classes occur) and statistics.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.keys import NonNegativeInt, PositiveInt, key, section
from utils.schema import Config

READS = {
    "experiment": "output_dir tokenizer_checkpoint",
    "model.vq_model": "all",
    "model.generator": "image_seq_len condition_num_classes",
    "dataset.params": "pretokenization on_bad_sample max_bad_fraction",
    "training": "seed",
    "sampling": "uint8_rule",
    "inspection": "all",
}


@dataclass
class InspectionConfig:
    """The tokens to look at."""

    rows: list[NonNegativeInt] | None = key(None, "indices of the samples to decode; null: random ones")
    num_images: PositiveInt = key(40, "number of random samples")


@dataclass
class InspectCodesConfig(Config):
    inspection: InspectionConfig = section(InspectionConfig)


if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(InspectCodesConfig, __doc__, READS)

import json
import math
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data.batch_sampler import permutation_of_pass
from data.codes.code_statistics import CodeStatistics, code_statistics
from data.codes.token_store import TokenStore
from data.training_batches import check_tokenizer, open_codes
from modeling.loading import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import atomic_file, write_text
from utils.files.lock import only_writer
from utils.images import make_captioned_grid, to_uint8, write_png

MOST_FREQUENT = 5  # codes that are printed
DECODED_AT_ONCE = 16  # images
GRID_COLUMNS = 8
MAX_STAIRS = 4096  # of a histogram, more than it has pixels


def main(config: InspectCodesConfig) -> None:
    with only_writer(Path(config.experiment.output_dir), inside=True):
        inspect(config)


def inspect(config: InspectCodesConfig) -> None:
    """Write the files of `experiment.output_dir`."""
    if config.dataset.params.pretokenization is None:
        raise InputError("dataset.params.pretokenization: missing; give the codes to inspect")
    tokenizer = load_tokenizer(config)
    store = open_codes(config)
    check_tokenizer(store, tokenizer.sha256())
    rows = choose_rows(store, config)
    output_dir = Path(config.experiment.output_dir)
    pictures = []
    if tokenizer.has_images:
        pictures.append(output_dir / "codes.png")
        write_png(pictures[0], decoded_grid(store, rows, tokenizer, config))
    statistics = code_statistics(store)
    figures = summary(store, statistics, tokenizer.code_shape)
    for name, value in figures.items():
        print(f"{name}: {value}")
    write_text(output_dir / "statistics.json", json.dumps(figures, indent=1) + "\n")
    pictures.append(output_dir / "statistics.png")
    counts = {"codes, most frequent first": statistics.code_counts, "samples of each class": statistics.class_counts}
    save_histograms({name: -np.sort(-values) for name, values in counts.items()}, pictures[-1])
    print(f"look at {' and '.join(map(str, pictures))}")


def choose_rows(store: TokenStore, config: InspectCodesConfig) -> list[int]:
    """The rows `inspection.rows`, or random ones, in order; raises InputError for a row that does not exist."""
    rows = config.inspection.rows
    if rows is None:
        count = min(config.inspection.num_images, len(store))
        order = permutation_of_pass(len(store), config.training.seed, dataset_pass=0)
        return sorted(order[:count].tolist())
    for row in rows:
        if not 0 <= row < len(store):
            raise InputError(f"inspection.rows: found {row}, expected 0 to {len(store) - 1}")
    return rows


@torch.inference_mode()
def decoded_grid(store: TokenStore, rows: list[int], tokenizer: Tokenizer, config: Config) -> Image.Image:
    """The images of `rows`, each above its row number and class name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.to(device)
    images = []
    for first in range(0, len(rows), DECODED_AT_ONCE):
        codes = store.__getitems__(rows[first : first + DECODED_AT_ONCE])["codes"].to(device)  # (b, N)
        images.append(to_uint8(tokenizer.decode(codes), config.sampling.uint8_rule))
    captions = [f"{row}: {store.class_name(int(store.class_ids[row]))}" for row in rows]
    return make_captioned_grid(np.concatenate(images), captions, GRID_COLUMNS)


def summary(store: TokenStore, statistics: CodeStatistics, code_shape: tuple[int, ...]) -> dict[str, Any]:
    """The printed statistics, by name."""
    grid = f"grid {code_shape[0]} x {code_shape[1]}" if len(code_shape) == 2 else "without a grid"
    meta, per_class = store.meta, statistics.class_counts
    rarest, commonest = int(per_class.argmin()), int(per_class.argmax())
    most_frequent = [f"{code} ({share:.2%})" for code, share in statistics.most_frequent(MOST_FREQUENT)]
    return {
        "samples": len(store),
        "images": len(store) // meta.crops_per_image,
        "crops per image": meta.crops_per_image,
        "codes per sample": f"{meta.image_seq_len}, {grid}",
        "codebook": meta.codebook_size,
        "codebook used": f"{statistics.usage:.2%}",
        "entropy of the codes": f"{statistics.entropy:.3f} of {math.log2(meta.codebook_size):.3f} bits",
        "most frequent codes": ", ".join(most_frequent),
        "classes": f"{meta.num_classes}, {int((per_class > 0).sum())} of them with samples",
        "samples of the rarest class": f"{per_class[rarest]} ({store.class_name(rarest)})",
        "samples of the commonest class": f"{per_class[commonest]} ({store.class_name(commonest)})",
        "tokenizer": meta.tokenizer_sha256,
    }


def save_histograms(counts: dict[str, np.ndarray], path: Path) -> None:
    """Draw counts (K,) as steps, a panel for each name."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(figure.subplots(1, len(counts), squeeze=False).flat, counts.items(), strict=True):
        width = -(-len(values) // MAX_STAIRS)  # of a step: matplotlib needs a minute for 2^18
        axes.stairs(values[::width], [*range(0, len(values), width), len(values)], fill=True)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=100, format="png")


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
