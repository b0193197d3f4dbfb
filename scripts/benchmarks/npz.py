"""Packing images into the npz: streamed part files against a PNG per image, read back and saved at once."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling.sampling.image_sampler import class_labels_of
from scripts.benchmarks.measure import describe, extra_rss_mb, interleaved, seconds
from scripts.sample_imagenet_rear import pack
from utils.config import load_config
from utils.errors import InputError
from utils.files.sample_chunks import SampleChunks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=5000, help="images in the npz; they need 3 x their size on disk")
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=50, help="images per part")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way, at --baseline-images")
    parser.add_argument("--baseline-images", type=int, default=100, help="images for the comparison")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The memory of packing all images, and the rates of both ways on fewer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "all", arguments.images, arguments)
        with extra_rss_mb() as extra:
            pack_seconds = seconds(lambda: pack_parts(folder / "all", arguments.images, arguments))
        (folder / "all.npz").unlink()

        few = arguments.baseline_images
        batches = [pixels_of(range(i, min(i + 10, few)), arguments.resolution) for i in range(0, few, 10)]
        pixels = np.concatenate(batches)  # made beforehand: both ways start from the same images

        def streamed() -> None:
            write_parts(folder / "few", few, arguments, pixels)
            pack_parts(folder / "few", few, arguments)

        ways = {"ours": streamed, "png": lambda: png_way(folder, pixels)}
        interleaved(ways, repeats=1, budget=60)
        check_equal(folder / "few.npz", folder / "png.npz")
        times = interleaved(ways, arguments.repeats, budget=120)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{arguments.images} images packed in {pack_seconds:.3g} s, {extra[0]:.1f} MB above the memory before")
    for name, values in times.items():
        print(f"  {name:5} {describe(values)} s, {few / medians[name]:.4g} images/s, written and packed")
    return {
        "images_per_s": few / medians["ours"],
        "images_per_s_png": few / medians["png"],
        "ratio_png": medians["png"] / medians["ours"],
        "pack_images_per_s": arguments.images / pack_seconds,
        "extra_rss_mb": extra[0],
        **{name: getattr(arguments, name) for name in ("images", "resolution", "batch")},
    }


def pixels_of(block: range, resolution: int) -> np.ndarray:
    """Smooth images with some noise, so that PNG has work to do: (len(block), H, W, 3) uint8."""
    ramp = np.linspace(0, 200, resolution)[:, None, None]
    noise = np.random.default_rng(block.start).integers(0, 16, (len(block), resolution, resolution, 3))
    return (ramp + noise).astype(np.uint8)


def write_parts(output: Path, images: int, arguments: argparse.Namespace, pixels: np.ndarray | None = None) -> None:
    """Parts of these pixels, or of some that are made part by part."""
    parts = SampleChunks(output.with_name(output.name + ".parts"), images, arguments.batch)
    parts.claim({})
    for block in parts.blocks:
        made = pixels_of(block, arguments.resolution) if pixels is None else pixels[block.start : block.stop]
        parts.save(block, made)


def pack_parts(output: Path, images: int, arguments: argparse.Namespace) -> None:
    config = load_config([f"experiment.output_dir={output}", f"sampling.num_fid_samples={images}"])
    parts = SampleChunks(output.with_name(output.name + ".parts"), images, arguments.batch)
    labels = class_labels_of(range(images), config.model.generator.condition_num_classes)
    pack(parts, output, config, labels, fingerprint={}, figures={})


def png_way(folder: Path, pixels: np.ndarray) -> None:
    files = [folder / f"{i:06d}.png" for i in range(len(pixels))]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    np.savez(folder / "png.npz", arr_0=np.stack([np.asarray(Image.open(file)) for file in files]))


def check_equal(ours: Path, theirs: Path) -> None:
    """
    Raises:
        InputError: other images.
    """
    if not np.array_equal(np.load(ours)["arr_0"], np.load(theirs)["arr_0"]):
        raise InputError("gate: both ways packed other images, expected the same")
