"""Convert tokenized images: the published jsonl to a token store, or a store to jsonl.

    python scripts/convert_tokens.py maskgitvq.jsonl maskgitvq.tokens --crops-per-image 10
    python scripts/convert_tokens.py maskgitvq.tokens maskgitvq.jsonl

Training converts a jsonl itself; this command does so in advance and can record more about the tokens. Every line
is checked; bad lines are reported with their number and the reason. All CPUs are used, each with little memory.

Writes TARGET atomically; rerun the same command to resume a killed conversion. Writing a store
needs twice the disk space of its tokens (13 GB for ImageNet's ten crops).
"""

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from data.codes.conversion import is_conversion, jsonl_to_store, store_to_jsonl
from data.codes.jsonl import Sizes
from data.codes.store_files import open_store
from data.images.tar_shards import read_names
from utils.errors import InputError, input_errors_exit
from utils.files.lock import only_writer
from utils.files.provenance import differences
from utils.files.text import user_path
from utils.processes import num_cpus


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    source, target = arguments.source, arguments.target
    suffixes = (source.suffix, target.suffix)
    if suffixes not in ((".jsonl", ".tokens"), (".tokens", ".jsonl")):
        raise InputError(f"{source} to {target}: expected a .jsonl and a .tokens, in either order")
    started = time.perf_counter()
    with only_writer(target):
        if target.suffix == ".tokens":
            count = to_store(source, target, arguments)
        else:
            count = store_to_jsonl(source, target, arguments.processes)
    seconds = time.perf_counter() - started
    print(f"{target}: {count} samples, {count / seconds:.0f} per second with {arguments.processes} processes")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=user_path, help=".jsonl file or .tokens store")
    parser.add_argument("target", type=user_path, help=".tokens store or .jsonl file")
    parser.add_argument("--processes", type=int, default=num_cpus(), help="default: all CPUs, here %(default)s")
    of_jsonl = parser.add_argument_group("ranges for the lines of a jsonl, and facts that it lacks")
    of_jsonl.add_argument("--codebook-size", type=int, default=1024, help="default %(default)s")
    of_jsonl.add_argument("--image-seq-len", type=int, default=256, help="codes per image, default %(default)s")
    of_jsonl.add_argument("--num-classes", type=int, default=1000, help="default %(default)s")
    of_jsonl.add_argument("--max-bad-fraction", type=float, default=0.0, help="leave out bad lines up to this share")
    of_jsonl.add_argument("--crops-per-image", type=int, default=1, help="consecutive lines that belong to one image")
    of_jsonl.add_argument("--class-names", type=user_path, help="JSON list of names in the order of the class ids")
    arguments = parser.parse_args(argv)
    if min(arguments.processes, arguments.crops_per_image) < 1:
        parser.error("--processes and --crops-per-image: expected at least 1")
    if arguments.max_bad_fraction and arguments.crops_per_image > 1:
        parser.error("--max-bad-fraction: not with --crops-per-image; a missing line would shift the crops")
    return arguments


def to_store(jsonl: Path, store_path: Path, arguments: argparse.Namespace) -> int:
    """Convert unless the store is complete; returns the number of samples. Raises InputError for bad lines, or another
    store of that name."""
    if not jsonl.is_file():
        raise InputError(f"{jsonl}: no such file")
    names = None if arguments.class_names is None else read_names(arguments.class_names)
    num_classes = arguments.num_classes if names is None else len(names)
    sizes = Sizes(codebook_size=arguments.codebook_size, image_seq_len=arguments.image_seq_len, num_classes=num_classes)
    if is_conversion(store_path, jsonl, sizes, arguments.max_bad_fraction):
        meta = open_store(store_path)[0]
        different = differences(
            found={key: getattr(meta, key) for key in ("image_seq_len", "crops_per_image", "class_names")},
            expected={
                "image_seq_len": arguments.image_seq_len,
                "crops_per_image": arguments.crops_per_image,
                "class_names": names,
            },
        )
        if different:
            raise InputError(f"{store_path}: exists with {different[0]}; delete it or choose another name")
        print(f"{store_path}: is already the conversion of {jsonl}")
        return meta.num_samples
    if store_path.exists():
        raise InputError(
            f"{store_path}: exists and is not made from {jsonl} as it is now; delete it or choose another name"
        )
    bad_lines = jsonl_to_store(
        jsonl,
        store_path,
        sizes,
        processes=arguments.processes,
        max_bad_fraction=arguments.max_bad_fraction,
        crops_per_image=arguments.crops_per_image,
        class_names=names,
    )
    if bad_lines.count:
        print(f"{jsonl}: left out {bad_lines.count} bad lines: {'; '.join(bad_lines.reasons)}")
    return bad_lines.num_lines - bad_lines.count


if __name__ == "__main__":
    with input_errors_exit():
        main()
