"""Pack a folder of images, with a sub-folder per class, into webdataset shards.

    python scripts/make_shards.py imagenet/train shards/train --prefix imagenet-train \\
        --class-names LOC_synset_mapping.txt
    python scripts/make_shards.py my_images outputs/mine/images --heldout 0.1

The bytes of the images are not changed. Images are shuffled reproducibly, and with --heldout a fraction of
each class goes to separate validation shards. All CPUs are used; rerun the same command to resume a killed run.

Writes to OUTPUT, atomically: <prefix>-000000.tar ..., heldout-000000.tar ..., an index of each
(<prefix>-000000.index.npz ...), which avoids reading all headers at each start, classes.json (names in the order of
the class ids), shards.json (samples, bytes and sha256 of each shard) and provenance.json. For existing shards

    python scripts/make_shards.py --index "shards/imagenet-train-{000000..000252}.tar"

writes only the indices, next to the shards.
"""

import argparse
import os
import re
import sys
from contextlib import closing
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from tqdm import tqdm

from data.images.image_folder import ImageFolder
from data.images.shard_writer import (
    HELDOUT_PREFIX,
    index_shards,
    is_written,
    plan_shards,
    provenance_of,
    write_shards,
)
from data.images.tar_shards import find_shards
from utils.errors import InputError, input_errors_exit
from utils.files.lock import only_writer
from utils.files.text import read_text, same_letters, user_path
from utils.processes import num_cpus

SAMPLES_PER_SHARD = 5064  # 253 shards of ImageNet's training images


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.index is not None:
        found = find_shards(arguments.index)
        with only_writer(found[0]):
            list(tqdm(index_shards(found, arguments.processes), total=len(found), unit="shard"))
        print(f"{arguments.index}: {len(found)} shards indexed")
        return
    if not arguments.source.is_dir():
        raise InputError(f"{arguments.source}: no such folder")
    if arguments.output.resolve().is_relative_to(arguments.source.resolve()):
        raise InputError(f"{arguments.output}: found in the folder of the images, where it would be a class")
    with only_writer(arguments.output):
        pack(arguments)


def pack(arguments: argparse.Namespace) -> None:
    source = ImageFolder(arguments.source)
    names = source.class_names
    if arguments.class_names is not None:
        names = read_titles(arguments.class_names, source.class_names)
    shards = plan_shards(source, arguments.prefix, arguments.samples_per_shard, arguments.heldout)
    provenance = provenance_of(source, names, shards)
    if is_written(arguments.output, provenance):
        print(f"{arguments.output}: is already complete")
        return
    with (
        tqdm(total=len(source), unit="image", smoothing=0) as progress,
        closing(write_shards(source, provenance, shards, arguments.output, arguments.processes)) as written,
    ):
        for count in written:
            progress.update(count)
    heldout = sum(len(shard.indices) for shard in shards if shard.name.startswith(f"{HELDOUT_PREFIX}-"))
    print(
        f"{arguments.output}: {len(source) - heldout} images and {heldout} held out, of {len(names)} "
        f"classes, in {len(shards)} shards"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=user_path, nargs="?", help="folder with a sub-folder per class")
    parser.add_argument("output", type=user_path, nargs="?", help="output folder")
    parser.add_argument(
        "--index", type=os.path.expanduser, metavar="SHARDS", help="instead of source and output: shards to index"
    )
    parser.add_argument("--prefix", default="train", help="prefix of the shard names, default %(default)s")
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="default %(default)s")
    parser.add_argument("--heldout", type=float, default=0.0, help="share of each class, below 1; default none")
    parser.add_argument("--class-names", type=user_path, help="text file of lines `folder name` with class names")
    parser.add_argument("--processes", type=int, default=num_cpus(), help="default: all CPUs, here %(default)s")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.output is None) == (arguments.index is None) or (arguments.index and arguments.source):
        parser.error("expected a source and an output, or --index SHARDS")
    if min(arguments.processes, arguments.samples_per_shard) < 1 or not 0 <= arguments.heldout < 1:
        parser.error("expected at least 1 process and 1 sample per shard, and --heldout from 0 to below 1")
    if not re.fullmatch(r"\w[\w.-]*", arguments.prefix):  # part of a file name, which is in patterns such as a-*.tar
        parser.error(f"--prefix {arguments.prefix!r}: expected letters, digits, _, . and -")
    if f"{arguments.prefix}-".startswith(f"{HELDOUT_PREFIX}-"):
        parser.error(f"--prefix {arguments.prefix}: {HELDOUT_PREFIX}-* is reserved for the validation shards")
    return arguments


def read_titles(path: Path, folders: list[str]) -> list[str]:
    """Names of the class folders from lines such as `n01440764 tench, Tinca tinca`; raises InputError for a missing
    file, or a folder without a line."""
    lines = [line.split(maxsplit=1) for line in same_letters(read_text(path)).splitlines() if line.strip()]
    titles = {line[0]: line[-1].strip() for line in lines}
    unnamed = [folder for folder in folders if folder not in titles]
    if unnamed:
        raise InputError(f"{path}: found no line for {len(unnamed)} class folders, such as {unnamed[0]}")
    return [titles[folder] for folder in folders]


if __name__ == "__main__":
    with input_errors_exit():
        main()
