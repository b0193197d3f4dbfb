"""Convert Fashion-MNIST, 70,000 images of clothing in ten classes, to shards or a folder of 32 x 32 RGB images.

    python scripts/fashion_mnist.py outputs/fashion/images
    python scripts/fashion_mnist.py outputs/fashion/folder --folder --source data

The four IDX files are found where Debian's package dataset-fashion-mnist or torchvision (with the root data or dataset)
leave them, or below --source; their content is compared with its sha256. Nothing is downloaded.

Writes to OUTPUT, atomically: train-*.tar and heldout-*.tar (the test images) with their indices, classes.json and
shards.json, as scripts/make_shards.py does; or with --folder train/ and heldout/, each with a sub-folder per class.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from data.images.fashion_mnist import find_source, is_written, write_folder, write_shards
from utils.errors import input_errors_exit
from utils.files.lock import only_writer
from utils.files.text import user_path


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    source = find_source(arguments.source)
    with only_writer(arguments.output):
        if is_written(arguments.output, form="folder" if arguments.folder else "shards"):
            print(f"{arguments.output}: is already complete")
            return
        write = write_folder if arguments.folder else write_shards
        write(source, arguments.output)
    print(f"{arguments.output}: the training and test images of {source}, as train and heldout")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=user_path, help="output folder")
    parser.add_argument("--source", type=user_path, help="folder of the IDX files, torchvision's root, or of dpkg -x")
    parser.add_argument("--folder", action="store_true", help="PNG files in a folder per class instead of shards")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with input_errors_exit():
        main()
