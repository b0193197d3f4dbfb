"""Make a reference npz for evaluator.py from images of any size.

    python evaluation/make_reference.py imagenet/train REF.npz --resolution 256
    torchrun --nproc_per_node=8 evaluation/make_reference.py "shards/train-{000000..000252}.tar" REF.npz

Reads a folder with a sub-folder per class, webdataset shards or an npz (arr_0: uint8 NHWC), and takes ADM's centre
crop. Writes the Inception statistics of all images (mu, sigma, mu_s, sigma_s) and up to 10,000 of the images (arr_0),
and their provenance to a JSON file of the same name.

This file is a script: it joins `data` and `evaluation`, which do not import each other.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from data.images.image_io import COLOURS, ImageDecoding
from data.images.notices import CountedImages
from data.images.reading import open_images
from data.images.transforms import adm_center_crop
from evaluation.evaluator import add_feature_options, load_extractor, positive
from evaluation.features import Extractor
from evaluation.inputs import MIN_IMAGES, WEIGHTS, open_input
from evaluation.reference import CroppedImages, ImageSource, NpzSource, make_reference
from utils.distributed import init_distributed
from utils.errors import InputError, input_errors_exit
from utils.files.hashing import file_sha256
from utils.files.provenance import is_made, write_record
from utils.run.run_environment import code_facts


def open_source(source: str, output: Path, verify: bool, decoding: ImageDecoding) -> ImageSource:
    """Open the images, and check before hours of work that the result can be written.

    Raises:
        InputError: no images, damaged or too few ones, or no folder for the output.
    """
    if not output.parent.is_dir():
        raise InputError(f"{output}: no folder {output.parent}")
    opened: ImageSource
    if source.endswith(".npz"):
        opened = NpzSource(open_input(Path(source), verify).images)
    else:
        opened = CountedImages(open_images(source, decoding=decoding))
    if len(opened) < MIN_IMAGES:
        raise InputError(f"{source}: found {len(opened)} images, expected at least {MIN_IMAGES}")
    return opened


def provenance_of(source: ImageSource, extractor: Extractor, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the reference depends on; the names and classes of a folder or shards stand for their content."""
    images = source.source.fingerprint if isinstance(source, CountedImages) else file_sha256(Path(args.source))
    options = {name: getattr(args, name) for name in ("resolution", "max_images", "background", "exif_orientation")}
    return {"images": images, WEIGHTS: extractor.weights_sha256, **options}


def record_provenance(output: Path, provenance: dict[str, Any]) -> None:
    """
    Raises:
        InputError: the output exists with another provenance.
    """
    is_made(output, provenance)
    write_record(output, provenance, figures=code_facts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, shards or npz")
    parser.add_argument("output", type=Path, help="npz to write")
    parser.add_argument("--resolution", type=positive, default=256, help="of the crops, in pixels")
    parser.add_argument("--max-images", type=positive, default=10_000, help="in arr_0")
    parser.add_argument("--background", choices=COLOURS, default="white", help="of transparent images, default white")
    parser.add_argument("--exif-orientation", action="store_true", help="rotate photos as their EXIF entry says")
    add_feature_options(parser)
    args = parser.parse_args()
    if args.max_images < MIN_IMAGES:
        parser.error(f"--max-images {args.max_images}: expected at least {MIN_IMAGES}, as evaluator.py does")
    with init_distributed() as ctx:
        device = args.device or ctx.device
        extractor = ctx.rank0_first(load_extractor, "inception", args.inception, device)
        decoding = ImageDecoding(args.background, args.exif_orientation)
        source = ctx.rank0_first(open_source, args.source, args.output, verify=ctx.is_rank0, decoding=decoding)
        with ctx.locked(args.output):
            ctx.broadcast_from_rank0(record_provenance, args.output, provenance_of(source, extractor, args))
            images = CroppedImages(source, lambda image: adm_center_crop(image, args.resolution))
            ctx.print_on_rank0(f"weights: {extractor.weights_name}, sha256 {extractor.weights_sha256}")
            make_reference(images, extractor, args.output, ctx, device, args.batch_size, args.max_images)
            if isinstance(source, CountedImages):
                source.notes.summary()
            num_stored = min(len(images), args.max_images)
            ctx.print_on_rank0(f"statistics of {len(images)} images, {num_stored} of them in {args.output}")


if __name__ == "__main__":
    with input_errors_exit():
        main()
