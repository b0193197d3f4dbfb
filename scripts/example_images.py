"""Write example images of your own, as a folder with a sub-folder per class.

    python scripts/example_images.py digits outputs/digits/images_of_digits
    python scripts/example_images.py emoji outputs/emoji_images --source .

digits: 1,797 handwritten digits of the package scikit-learn, as PNG files of 32 pixels. emoji: 1,793 pictures of 64
pixels with transparent parts, in nine classes, of Debian's package ruby-gemojione (CC BY-SA 4.0), installed or unpacked
below --source:

    apt-get download ruby-gemojione && dpkg -x ruby-gemojione_*.deb .

Nothing is downloaded here. OUTPUT is written atomically; if it exists, nothing is done.
"""

import argparse
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
from PIL import Image

from utils.errors import InputError, input_errors_exit
from utils.files.atomic import atomic_folder
from utils.files.json_file import read_json
from utils.files.text import user_path

GEM = "usr/share/rubygems-integration/all/gems"
DIGIT_PIXELS = 32
NO_CLASS = "extras"  # a single picture


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    output = arguments.output
    if output.exists():
        print(f"{output}: exists already")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as partial:
        count = write_digits(partial) if arguments.kind == "digits" else write_emoji(partial, arguments.source)
    print(f"{output}: {count} images")


def write_digits(folder: Path) -> int:
    """Returns the number of images; raises InputError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("digits: the package scikit-learn is missing; pip install scikit-learn") from error
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray((pixels * 15).astype(np.uint8))
        image.resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC).save(path)
    return len(digits.images)


def write_emoji(folder: Path, source: Path) -> int:
    """Returns the number of images; raises InputError if the package is not below `source`."""
    gems = sorted((source / GEM).glob("gemojione-*"))
    if not gems:
        raise InputError(f"{source / GEM}: found no gemojione-*, expected Debian's package ruby-gemojione; see --help")
    count = 0
    for entry in read_json(gems[-1] / "config/index.json").values():
        path = gems[-1] / "assets/png" / f"{entry['unicode'].upper()}.png"
        if entry["category"] != NO_CLASS:
            (folder / entry["category"]).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / entry["category"] / path.name)
            count += 1
    return count


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["digits", "emoji"])
    parser.add_argument("output", type=user_path, help="folder to write")
    parser.add_argument("--source", type=user_path, default=Path("/"), help="folder of dpkg -x; default: installed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with input_errors_exit():
        main()
