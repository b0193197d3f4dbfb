"""Complete images from a part of their codes: the rest is sampled given them.

    python scripts/complete_images.py config=configs/rear_rar_l.yaml experiment.output_dir=outputs/completed \\
        experiment.generator_checkpoint=outputs/rear_rar_l completion.inputs=photos completion.keep=top:0.5

The images are cropped in the centre and encoded; the codes of the part that `completion.keep` names stay as they are.
A model in raster order (`model.generator.order=raster`) completes what comes after them, so that only top:SHARE, or a
picture like it, can stay; one that was trained in random orders gets them first, wherever they are.

Writes to `experiment.output_dir`: inputs.npz (arr_0: uint8 NHWC images), completions.npz (arr_0: the completions, those
of an image one after another; arr_1: int64, which input each is of; kept: bool, the grid of the codes that stayed),
completions.png (of the first images: input, the part that stayed, completions) and completions.json (PSNR of the part
that was sampled, and what all was made from: other completions are not replaced).
"""

import sys
from pathlib import Path

READS = (
    *("experiment.output_dir", "experiment.tokenizer_checkpoint", "experiment.generator_checkpoint"),
    *("experiment.allow_other_tokenizer", "model", "completion", "training.enable_tf32"),
    *("sampling.seed", "sampling.order", "sampling.uint8_rule", "sampling.per_gpu_batch_size", "sampling.compile"),
    *(f"dataset.preprocessing.{key}" for key in ("resize_shorter_edge", "crop_size", "background", "exif_orientation")),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit

    CONFIG = load_config_or_exit(__doc__, READS)

import dataclasses
import hashlib
import re
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from data.images.image_folder import PlainFolder, is_plain
from data.images.image_io import ImageDecoding
from data.images.reading import ImageDataset, open_images
from data.images.transforms import training_transform
from evaluation.reconstruction import psnr_of_part
from modeling.orders import known_first
from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_decoder import ImageDecoder
from modeling.sampling.image_sampler import load_trained
from modeling.sampling.inpainting import complete, in_region
from modeling.tokenizers.registry import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config
from utils.distributed import DistributedContext
from utils.errors import InputError, NonFiniteError, input_errors_exit
from utils.files.lock import only_writer
from utils.files.npz import write_npz
from utils.files.provenance import is_made, write_record
from utils.files.weights import weights_sha256
from utils.images import make_grid, to_float, write_png
from utils.precision import matmul_precision
from utils.run.run_environment import code_facts

REGION = re.compile(r"(top|left|center|border):(0?\.\d+)")
GRID_ROWS = 8  # images in the picture
GREY = 127  # of the part that was sampled


def main(config: Config) -> None:
    with only_writer(Path(config.experiment.output_dir), inside=True):
        complete_all(config)


def complete_all(config: Config) -> None:
    """The files of `experiment.output_dir`."""
    tokenizer = load_tokenizer(config)
    if not tokenizer.has_images:
        raise tokenizer.no_images("completion.inputs")
    kept = kept_codes(config, tokenizer)
    model = load_model(config, tokenizer)
    pixels = read_inputs(config)
    output_dir = Path(config.experiment.output_dir)
    result, made_from = output_dir / "completions.npz", origin(config, pixels, kept, model, tokenizer)
    if is_made(result, made_from):
        print(f"{result}: made from the same already")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    tokenizer.to(device)
    with matmul_precision(config.training.enable_tf32):
        codes = encode(pixels, tokenizer, config)
        count = len(codes) * config.completion.num_completions
        steps = -(-count // config.sampling.per_gpu_batch_size) * codes.shape[1]
        with tqdm(desc="sampling", total=steps, unit="code") as progress:
            sampler = CodeSampler(model, config.model.generator, compile_mode=config.sampling.compile)
            completed = complete(codes, kept, sampler, config, progress.update)
        assert torch.equal(completed[:, :, kept], codes[:, None, kept].expand(-1, completed.shape[1], -1))
        images = decode(completed.flatten(0, 1), tokenizer, config).reshape(*completed.shape[:2], *pixels.shape[1:])
        limit = decode(codes, tokenizer, config)
    grid = kept.view(tokenizer.code_shape).numpy()
    sampled = ~in_pixels(grid, tokenizer.resolution)
    figures = {
        "kept_codes": f"{int(kept.sum())} of {len(kept)}",
        "psnr": psnr_of_part(pixels, images, sampled),
        "psnr_of_the_tokenizer": psnr_of_part(pixels, limit[:, None], sampled),
    }
    write_png(output_dir / "completions.png", picture(pixels, images, grid))
    write_npz(output_dir / "inputs.npz", {"arr_0": (pixels.shape, np.uint8, [pixels])})
    flat_images, which = images.reshape(-1, *pixels.shape[1:]), np.repeat(np.arange(len(pixels)), images.shape[1])
    entries = {"arr_0": flat_images, "arr_1": which.astype(np.int64), "kept": grid}
    write_npz(result, {name: (array.shape, array.dtype, [array]) for name, array in entries.items()})
    write_record(result, made_from, figures={"bytes": result.stat().st_size, **figures, **code_facts()})
    shown = ", ".join(f"{name} {figures[name]:.2f} dB" for name in ("psnr", "psnr_of_the_tokenizer"))
    print(f"{output_dir}: kept {figures['kept_codes']} codes; of the others {shown}")


def kept_codes(config: Config, tokenizer: Tokenizer) -> Tensor:
    """Mask (N,) bool of the codes that `completion.keep` names.

    Raises:
        InputError: it names nothing, all or none of the codes, or what the model cannot complete.
    """
    keep = config.completion.keep
    if len(tokenizer.code_shape) != 2:
        raise InputError(f"completion.keep: found codes of shape {tokenizer.code_shape}, expected a grid of rows")
    region = REGION.fullmatch(keep)
    if region:
        kept = torch.from_numpy(in_region(region[1], float(region[2]), *tokenizer.code_shape))
    elif Path(keep).is_file():
        kept = torch.from_numpy(white_of(Path(keep), *tokenizer.code_shape))
    else:
        words = "top:SHARE, left:SHARE, center:SHARE or border:SHARE with a share between 0 and 1, or a picture"
        raise InputError(f"completion.keep={keep}: expected {words}")
    kept = kept.flatten()
    if kept.all() or not kept.any():
        raise InputError(
            f"completion.keep={keep}: keeps {int(kept.sum())} of {len(kept)} codes, expected some, not all"
        )
    is_prefix = torch.equal(known_first(kept[None], None)[0], torch.arange(len(kept)))
    if config.model.generator.order == "raster" and not is_prefix:
        raise InputError(
            f"completion.keep={keep}: expected top:SHARE, as model.generator.order=raster: a model that was trained in "
            "raster order alone completes what comes after the kept codes"
        )
    if config.model.generator.order == "annealed" and not is_prefix:
        print(f"completion.keep={keep}: weights from the end of an annealed run know raster order alone (top:SHARE)")
    return kept


def white_of(path: Path, rows: int, columns: int) -> np.ndarray:
    """Mask (rows, columns) bool of a square picture: where its mean is nearer to white than to black.

    Raises:
        InputError: no picture, or no square one.
    """
    try:
        with Image.open(path) as image:
            grey = image.convert("L")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(
            f"completion.keep={path}: found no picture that can be read ({type(error).__name__})"
        ) from error
    if grey.width != grey.height:
        raise InputError(f"completion.keep={path}: found {grey.width} x {grey.height} pixels, expected a square")
    return np.asarray(grey.resize((columns, rows), Image.Resampling.BOX)) > GREY


def load_model(config: Config, tokenizer: Tokenizer) -> ReAR:
    """
    Raises:
        InputError: no weights, weights of another model or tokenizer, or a class label that the model does not know.
    """
    label, num_classes = config.completion.class_label, config.model.generator.condition_num_classes
    if label is not None and label >= num_classes:
        raise InputError(f"completion.class_label={label}: expected 0 to {num_classes - 1}, or null for the null class")
    return load_trained(config, tokenizer, DistributedContext(0, 1, torch.device("cpu")))[0]


def read_inputs(config: Config) -> np.ndarray:
    """Centre crops (n, H, W, 3) uint8 of the first images of `completion.inputs`.

    Raises:
        InputError: the key is missing, there are no images, or one cannot be read.
    """
    if config.completion.inputs is None:
        raise InputError("completion.inputs: missing; give a folder of images or tar shards")
    path, preprocessing = Path(config.completion.inputs), config.dataset.preprocessing
    decoding = ImageDecoding.of(preprocessing)
    source = PlainFolder(path) if is_plain(path) else open_images(str(path), decoding=decoding)
    source.decoding = decoding
    transform = training_transform(dataclasses.replace(preprocessing, random_crop=False, random_flip=False))
    dataset, images = ImageDataset(source, transform, seed=0), []
    for index in tqdm(range(min(len(source), config.completion.num_images)), "inputs", unit="image"):
        images.append(dataset[index]["image"].numpy())
    return np.stack(images)


def origin(config: Config, pixels: np.ndarray, kept: Tensor, model: ReAR, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that the completions depend on."""
    generator, sampling, completion = config.model.generator, config.sampling, config.completion
    keys = ("order", "randomize_temperature", "guidance_scale", "guidance_scale_pow", "top_k", "top_p")
    return {
        "sha256 of the inputs": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "codes that stay": "".join(str(int(code)) for code in kept),
        **{f"completion.{key}": getattr(completion, key) for key in ("num_completions", "class_label")},
        **{f"model.generator.{key}": getattr(generator, key) for key in keys},
        **{f"sampling.{key}": getattr(sampling, key) for key in ("seed", "order", "uint8_rule")},
        "sha256 of experiment.generator_checkpoint": weights_sha256(model),
        "sha256 of experiment.tokenizer_checkpoint": tokenizer.sha256(),
    }


def batches(count: int, config: Config, what: str) -> tqdm:
    """Slices of so many rows, with a progress bar."""
    size = config.sampling.per_gpu_batch_size
    return tqdm([slice(start, start + size) for start in range(0, count, size)], what, unit="batch")


@torch.inference_mode()
def encode(pixels: np.ndarray, tokenizer: Tokenizer, config: Config) -> Tensor:
    """Codes (n, N), on the CPU."""
    device = next(tokenizer.parameters()).device
    parts = batches(len(pixels), config, "encoding")
    return torch.cat([tokenizer.encode(to_float(torch.from_numpy(pixels[part]).to(device))).cpu() for part in parts])


def decode(codes: Tensor, tokenizer: Tokenizer, config: Config) -> np.ndarray:
    """Images (len(codes), H, W, 3) uint8.

    Raises:
        InputError: logits or pixels that are not finite.
    """
    decoder = ImageDecoder(tokenizer, config.sampling.uint8_rule)
    device = next(tokenizer.parameters()).device
    parts = batches(len(codes), config, "decoding")
    try:
        return np.concatenate([decoder.finish(decoder.start(codes[part].to(device))) for part in parts])
    except NonFiniteError as error:
        raise InputError(
            f"{error} (experiment.generator_checkpoint={config.experiment.generator_checkpoint})"
        ) from error


def in_pixels(grid: np.ndarray, resolution: int) -> np.ndarray:
    """Mask (H, W) of the pixels that belong to codes of a mask (rows, columns)."""
    return grid.repeat(resolution // len(grid), axis=0).repeat(resolution // grid.shape[1], axis=1)


def picture(inputs: np.ndarray, images: np.ndarray, kept: np.ndarray) -> Image.Image:
    """A row for each of the first images: input, the part that stayed, completions."""
    inputs, images = inputs[:GRID_ROWS], images[:GRID_ROWS]
    parts = np.where(in_pixels(kept, inputs.shape[1])[..., None], inputs, np.uint8(GREY))
    rows = np.concatenate([inputs[:, None], parts[:, None], images], axis=1)
    return make_grid(rows.reshape(-1, *inputs.shape[1:]), rows.shape[1])


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
