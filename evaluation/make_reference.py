"""Make a reference npz for evaluator.py from images of any size.

    python evaluation/make_reference.py imagenet/train REF.npz --resolution 256
    torchrun --nproc_per_node=8 evaluation/make_reference.py "shards/train-{000000..000252}.tar" REF.npz

Reads a folder with a sub-folder per class, webdataset shards or an npz (arr_0: uint8 NHWC), and takes ADM's centre
crop. Writes the Inception statistics of all images (mu, sigma, mu_s, sigma_s) and up to 10,000 of the images (arr_0),
and their provenance to a JSON file of the same name.

This file is a script: it joins `data` and `evaluation`, which do not import each other.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.images.image_io import COLOURS, ImageDecoding
from data.images.image_source import ImageSource
from data.images.reading import CroppedImages, ImageDataset, evenly_spaced, open_images
from data.images.transforms import center_crop_transform
from evaluation.collect import Images, collect
from evaluation.evaluator import add_feature_options, load_extractor
from evaluation.features import Extractor
from evaluation.inputs import MIN_IMAGES, WEIGHTS, open_input
from utils.arguments import positive
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, input_errors_exit
from utils.files.hashing import file_sha256
from utils.files.npz import StoredImages, write_npz
from utils.files.provenance import is_made, write_record
from utils.files.text import user_path
from utils.run.run_environment import code_facts
from utils.schema import PreprocessingConfig

CHUNK_IMAGES = 100  # written at a time


class NpzSource(ImageSource):
    """The images of an npz, all of class 0."""

    class_names = None

    def __init__(self, images: StoredImages) -> None:
        self.images = images
        self.class_ids = np.zeros(len(images), dtype=np.int32)

    def key(self, index: int) -> str:
        return str(index)

    def location(self, index: int) -> str:
        return f"{self.images.path}, image {index}"

    def files(self) -> Iterator[Path]:
        yield self.images.path

    def _read(self, index: int) -> bytes:
        return self.images.read(index, index + 1).tobytes()

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images.read(index, index + 1)[0])

    @property
    def fingerprint(self) -> str:
        return file_sha256(self.images.path)


def open_source(source: str, output: Path, verify: bool, decoding: ImageDecoding) -> ImageSource:
    """The images of the command line. Raises InputError before hours of work, also if the output has no folder."""
    if not output.parent.is_dir():
        raise InputError(f"{output}: no folder {output.parent}")
    if source.endswith(".npz"):
        opened: ImageSource = NpzSource(open_input(Path(source), verify).images)
    else:
        opened = open_images(source, decoding=decoding)
    if len(opened) < MIN_IMAGES:
        raise InputError(f"{source}: found {len(opened)} images, expected at least {MIN_IMAGES}")
    return opened


def provenance_of(source: ImageSource, extractor: Extractor, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the reference depends on; for a folder or shards the names and classes, not the contents."""
    options = {name: getattr(args, name) for name in ("resolution", "max_images", "background", "exif_orientation")}
    return {"images": source.fingerprint, WEIGHTS: extractor.weights_sha256, **options}


def record_provenance(output: Path, provenance: dict[str, Any]) -> None:
    """Write the provenance; raises InputError if the output exists with a different one."""
    is_made(output, provenance)
    write_record(output, provenance, figures=code_facts())


def write_reference(
    images: Images,
    selected: Images,
    extractor: Extractor,
    output: Path,
    ctx: DistributedContext,
    device: torch.device,
    batch_size: int,
) -> None:
    """Write mu, sigma, mu_s, sigma_s of `images`, and `selected` as arr_0: the layout of guided-diffusion's reference
    batches (https://github.com/openai/guided-diffusion/tree/main/evaluations).

    Every process of `ctx` calls it; rank 0 writes.
    """
    sums = collect(images, extractor, ctx, batch_size=batch_size, title="features", device=device)
    if not ctx.is_rank0:
        return
    assert sums.spatial is not None, "features of Inception"
    pool, spatial = sums.pool.gaussian(), sums.spatial.gaussian()
    statistics = {"mu": pool.mu, "sigma": pool.sigma, "mu_s": spatial.mu, "sigma_s": spatial.sigma}
    shape = (len(selected), *selected.read(0, 1).shape[1:])
    entries = {key: (array.shape, array.dtype, [array]) for key, array in statistics.items()}
    write_npz(output, {"arr_0": (shape, np.uint8, _chunks(selected)), **entries})


def _chunks(images: Images) -> Iterator[np.ndarray]:
    for start in tqdm(range(0, len(images), CHUNK_IMAGES), desc="arr_0", unit="chunk"):
        yield images.read(start, min(start + CHUNK_IMAGES, len(images)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=os.path.expanduser, help="folder, shards or npz")
    parser.add_argument("output", type=user_path, help="npz to write")
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
            preprocessing = PreprocessingConfig(resize_shorter_edge=args.resolution, crop_size=args.resolution)
            dataset = ImageDataset(source, center_crop_transform(preprocessing), seed=0)
            count = min(len(dataset), args.max_images)
            ctx.print_on_rank0(f"weights: {extractor.weights_name}, sha256 {extractor.weights_sha256}")
            write_reference(
                images=CroppedImages(dataset),
                selected=CroppedImages(dataset, evenly_spaced(len(dataset), count)),
                extractor=extractor,
                output=args.output,
                ctx=ctx,
                device=device,
                batch_size=args.batch_size,
            )
            ctx.print_on_rank0(f"statistics of {len(dataset)} images, {count} of them in {args.output}")


if __name__ == "__main__":
    with input_errors_exit():
        main()
