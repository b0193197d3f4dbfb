"""A page with the results of a finished quick start.

    python scripts/quickstart_report.py outputs/quickstart

Reads the files of scripts_bash/quickstart.sh. Prints a table, and writes to the same folder report.html (samples,
training curves, reconstructions and the table, in one file) and samples_by_region.png (a column of samples for each
region, the first ones, not selected).
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
from utils.html_page import commands, heading, page, paragraph, picture, table
from utils.images import samples_by_class, write_png
from utils.run.metrics_file import read_metrics

FRECHET = "Frechet distance (EfficientNet-Lite0) to {number} held-out tiles"
NEXT = r"""
source .venv/bin/activate # unless the quick start used an environment of yours

# Images of two classes, with another seed and guidance scale
python scripts/sample_imagenet_rear.py config=configs/rear_blue_marble.yaml \
  experiment.generator_checkpoint={folder}/rear experiment.output_dir={folder}/other_samples \
  sampling.class_labels=[3,7] sampling.seed=1 sampling.num_fid_samples=16 sampling.save_png=true \
  model.generator.guidance_scale=2

# The lower halves of held-out tiles, completed
python scripts/complete_images.py config=configs/rear_blue_marble.yaml \
  experiment.generator_checkpoint={folder}/rear experiment.output_dir={folder}/completed \
  completion.inputs="{folder}/images/heldout-*.tar"

# The same without the method, plain AR, and both trainings in one picture
OUT={folder}_ar bash scripts_bash/quickstart.sh \
  model.generator.perturb_mode=none model.generator.transition_alignment=false
python scripts/compare_runs.py {folder}/rear {folder}_ar/rear
""".strip()


def main(folder: Path) -> None:
    picture_path = folder / "samples_by_region.png"
    class_names = read_json(folder / "images/classes.json")
    write_png(picture_path, samples_by_class(np.load(folder / "samples.npz"), class_names))
    numbers = rows(folder)
    write_text(folder / "report.html", report(folder, numbers))
    print("\n".join(f"| {name} | {value} |" for name, value in [("quantity", "value"), ("---", "---"), *numbers]))
    print(f"\nOpen {folder / 'report.html'} in a browser: samples, training curves, reconstructions and this table")


def report(folder: Path, numbers: list[tuple[str, str]]) -> str:
    """The text of the page."""
    return page(
        "reAR: the quick start",
        [
            paragraph(
                "A small reAR was trained on satellite tiles of twelve regions. Its samples should look like tiles of "
                "their region: the same colours, coasts and clouds, but no tile twice. They cannot be sharper than the "
                "tokenizer's reconstructions below."
            ),
            picture(folder / "samples_by_region.png", "Samples of the trained model: a column for each region"),
            picture(
                folder / "tokenizer/reconstructions.png",
                "Held-out tiles and their reconstructions by the tokenizer, which is not trained here",
            ),
            picture(folder / "rear/training_curves.png", "Training: the cross-entropy falls, and the cosines rise"),
            table(numbers, header=("quantity", "value")),
            paragraph(
                "The Frechet distance compares features of two sets of images: lower is better. It is not FID, and "
                "comparable for equal numbers of images only. The trained model should be far below the untrained one; "
                "other tiles of the training regions show what is attainable."
            ),
            heading("What to try next"),
            commands(NEXT.format(folder=folder)),
        ],
    )


def rows(folder: Path) -> list[tuple[str, str]]:
    """Quantities and values of the table."""
    tokenizer = read_json(folder / "tokenizer/reconstruct.json")
    steps = [row for row in read_metrics(folder / "rear/metrics.jsonl") if "train/loss" in row]
    first, last = steps[0], steps[-1]
    reference = folder / "tokenizer/reference.npz"
    distances = {
        name: find_report(folder / f"{name}.npz", reference, "efficientnet_lite0")["metrics"]["frechet_distance"]
        for name in ("samples", "untrained_samples", "tokenizer/reconstructions", "train_tiles/reference")
    }
    number = len(np.load(folder / "samples.npz")["arr_1"])
    frechet = FRECHET.format(number=number)
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
