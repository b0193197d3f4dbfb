"""Table and picture of a finished quick start.

    python scripts/quickstart_report.py outputs/quickstart

Reads the files of scripts_bash/quickstart.sh. Prints the table; writes report.md and samples_by_region.png
(a column of samples for each region, the first ones, not selected) to the same folder.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np

from evaluation.report import find_report
from utils.errors import input_errors_exit
from utils.files.atomic import write_text
from utils.files.json_file import read_json
from utils.files.text import user_path
from utils.images import samples_by_class, write_png
from utils.run.metrics_file import read_metrics


def main(folder: Path) -> None:
    table = "\n".join(f"| {name} | {value} |" for name, value in [("quantity", "value"), ("---", "---"), *rows(folder)])
    write_text(folder / "report.md", table + "\n")
    picture = folder / "samples_by_region.png"
    class_names = read_json(folder / "images/classes.json")
    write_png(picture, samples_by_class(np.load(folder / "samples.npz"), class_names))
    print(f"{table}\n\nLook at {picture}, {folder}/rear/training_curves.png and {folder}/tokenizer/reconstructions.png")


def rows(folder: Path) -> list[tuple[str, str]]:
    tokenizer = read_json(folder / "tokenizer/reconstruct.json")
    steps = [row for row in read_metrics(folder / "rear/metrics.jsonl") if "train/loss" in row]
    first, last = steps[0], steps[-1]
    reference = folder / "tokenizer/reference.npz"
    distances = {
        name: find_report(folder / f"{name}.npz", reference, "efficientnet_lite0")["metrics"]["frechet_distance"]
        for name in ("samples", "untrained_samples", "tokenizer/reconstructions", "train_tiles/reference")
    }
    number = len(np.load(folder / "samples.npz")["arr_1"])
    frechet = f"Frechet distance (EfficientNet-Lite0) to {number} held-out tiles"
    return [
        ("tokenizer, held-out tiles: PSNR", f"{tokenizer['psnr']:.2f} dB"),
        ("tokenizer, held-out tiles: mean absolute error", f"{tokenizer['l1'] * 255:.2f} of 255 grey levels"),
        *[
            (f"training step {row['step']}: {label}", f"{row[key]:.4f}")
            for row in (first, last)
            for label, key in (
                ("loss", "train/loss"),
                ("cross-entropy, nats per code", "train/ar_loss"),
                ("token accuracy", "train/correct_tokens"),
            )
        ],
        (f"{frechet}: {number} samples", f"{distances['samples']:.1f}"),
        (f"{frechet}: {number} samples of an untrained model", f"{distances['untrained_samples']:.1f}"),
        (f"{frechet}: the tokenizer's reconstructions", f"{distances['tokenizer/reconstructions']:.1f}"),
        (f"{frechet}: {number} training tiles", f"{distances['train_tiles/reference']:.1f}"),
        ("trained / untrained", f"{distances['samples'] / distances['untrained_samples']:.2f}"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="folder of the quick start")
    with input_errors_exit():
        main(parser.parse_args().folder)
