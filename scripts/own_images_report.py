"""Report page of a finished scripts_bash/own_images.sh.

    python scripts/own_images_report.py outputs/mine

Prints the verdict on the tokenizer and the scores; writes report.html, with pictures, and samples_by_class.png (the
first samples of each class, not selected) to the same folder.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np

from evaluation.inputs import MIN_IMAGES
from evaluation.report import find_report
from utils.errors import input_errors_exit
from utils.files.atomic import write_text
from utils.files.json_file import read_json
from utils.files.text import user_path
from utils.html_page import page, paragraph, picture
from utils.images import samples_by_class, write_png

MAX_CLASSES = 16  # columns in samples_by_class.png
PICTURES = {
    "samples_by_class.png": "Samples, a column per class, not selected",
    "tokenizer/reconstructions.png": "Validation images above their reconstructions",
    "tokenizer/worst.png": "The ten validation images that the tokenizer reconstructs worst",
    "tokenizer/training_curves.png": "Training of the tokenizer",
    "rear/training_curves.png": "Training of the generator",
}


def main(folder: Path) -> None:
    class_names = read_json(folder / "images/classes.json")
    samples = np.load(folder / "samples.npz")
    is_shown = samples["arr_1"] < MAX_CLASSES
    shown = {"arr_0": samples["arr_0"][is_shown], "arr_1": samples["arr_1"][is_shown]}
    write_png(folder / "samples_by_class.png", samples_by_class(shown, class_names[:MAX_CLASSES]))
    lines = [*read_json(folder / "tokenizer/metrics.json")["verdict"], *scores(folder, count=len(samples["arr_1"]))]
    write_text(folder / "report.html", report(folder, lines))
    print("\n".join([*lines, f"Look at {folder / 'report.html'}"]))


def scores(folder: Path, count: int) -> list[str]:
    """Frechet distances to the held-out images, lower is better; why there are none for few."""
    heldout = read_json(folder / "heldout/reconstruct.json")["images"]
    if heldout < MIN_IMAGES:
        return [f"no scores: {heldout} validation images, a tenth of each class; at least {MIN_IMAGES} are required"]
    distances = {
        name: find_report(folder / f"{name}.npz", folder / "heldout/reference.npz", "efficientnet_lite0")["metrics"]
        for name in ("samples", "heldout/reconstructions")
    }
    of_samples, of_tokenizer = (metrics["frechet_distance"] for metrics in distances.values())
    return [
        f"Frechet distance (EfficientNet-Lite0) of {count} samples: {of_samples:.1f}; of the reconstructions of "
        f"held-out images: {of_tokenizer:.1f}"
    ]


def report(folder: Path, lines: list[str]) -> str:
    """The text of the page."""
    pictures = [picture(folder / name, caption) for name, caption in PICTURES.items() if (folder / name).is_file()]
    return page(folder.name, [*map(paragraph, lines), *pictures])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="OUT of own_images.sh")
    with input_errors_exit():
        main(parser.parse_args().folder)
