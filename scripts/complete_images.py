"""Complete images (inpainting and outpainting): sample the tokens outside a conditioning mask.

    python scripts/complete_images.py config=configs/rear_rar_l.yaml experiment.output_dir=outputs/completed \\
        experiment.generator_checkpoint=outputs/rear_rar_l completion.inputs=photos completion.keep=top:0.5

Images are centre-cropped and encoded. The tokens of the region `completion.keep` condition the sampled ones. A model in
raster order (`model.generator.order=raster`) can only sample what follows the conditioning tokens, so it needs
top:SHARE or such a mask; a model trained in random orders gets the conditioning tokens first, from any region.

Writes to `experiment.output_dir`: inputs.npz (arr_0: uint8 NHWC images), completions.npz (arr_0: the completions, all
completions of an image consecutively; arr_1: int64, the input of each; kept: bool, the grid of conditioning tokens),
completions.png (first images: input, conditioning region, completions) and completions.json (PSNR of the sampled region
and the provenance; completions with a different provenance are not replaced).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.keys import NonNegativeInt, PositiveInt, key, section
from utils.schema import SAMPLING_NAMES, Config

READS = {
    "experiment": "output_dir tokenizer_checkpoint generator_checkpoint allow_other_tokenizer",
    "model": "all",
    "dataset.preprocessing": "crop_size resize_shorter_edge background exif_orientation",
    "training": "enable_tf32",
    "sampling": "seed order uint8_rule per_gpu_batch_size compile",
    "completion": "all",
}


@dataclass
class CompletionConfig:
    """Inpainting and outpainting."""

    inputs: str | None = key(None, "images to complete: a folder of images, a folder per class, or tar shards")
    keep: str = key(
        "top:0.5",
        "conditioning tokens: top:SHARE, left:SHARE, center:SHARE (a square with this share of each side), "
        "border:SHARE (all but a square) or a square picture as mask, white at conditioning tokens",
    )
    num_images: PositiveInt = key(40, "number of inputs, from the first on")
    num_completions: PositiveInt = key(3, "completions of each image; the k-th, from 0, uses sampling.seed + k")
    class_label: NonNegativeInt | None = key(None, "class of all images; null: the null class, without guidance")


@dataclass
class CompleteImagesConfig(Config):
    completion: CompletionConfig = section(CompletionConfig)


if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(CompleteImagesConfig, __doc__, READS)

import hashlib
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.images.image_folder import PlainFolder, is_plain
from data.images.image_io import ImageDecoding
from data.images.reading import ImageDataset, open_images
from data.images.transforms import center_crop_transform
from evaluation.reconstruction import psnr_of_part
from modeling.loading import load_generator, load_tokenizer
from modeling.orders import conditioning_first
from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_sampler import ImageDecoder
from modeling.sampling.inpainting import inpaint, region_mask
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import InputError, NonFiniteError, input_errors_exit
from utils.faults import fault_point
from utils.files.lock import only_writer
from utils.files.npz import write_npz
from utils.files.provenance import is_made, write_record, write_unfinished_record
from utils.files.weights import weights_sha256
from utils.images import make_grid, to_float, write_png
from utils.precision import matmul_precision
from utils.run.run_environment import code_facts
from utils.run.weights_path import TrainedWeights, check_classes, find_generator_weights

REGION = re.compile(r"(top|left|center|border):(0?\.\d+)")
GRID_ROWS = 8  # images in the picture
GREY = 127  # of the sampled region in the picture


def main(config: CompleteImagesConfig) -> None:
    with only_writer(Path(config.experiment.output_dir), inside=True):
        complete_all(config)


def complete_all(config: CompleteImagesConfig) -> None:
    """Write the files of `experiment.output_dir`."""
    tokenizer = load_tokenizer(config)
    if not tokenizer.has_images:
        raise tokenizer.no_images("completion.inputs")
    weights, config = find_generator_weights(config, tokenizer.sha256())
    mask = conditioning_mask(config.completion.keep, config, tokenizer)
    model = load_model(weights, config)
    pixels = read_inputs(config)
    output_dir = Path(config.experiment.output_dir)
    result = output_dir / "completions.npz"
    provenance = provenance_of(config, pixels, mask, model, tokenizer)
    if is_made(result, provenance):
        print(f"{result}: already made from the same inputs, weights and config")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    tokenizer.to(device)
    with matmul_precision(config.training.enable_tf32):
        codes = encode(pixels, tokenizer, config)
        completed = sample_completions(codes, mask, model, config)
        images = decode(completed.flatten(0, 1), tokenizer, config)
        images = images.reshape(*completed.shape[:2], *pixels.shape[1:])  # (n, K, H, W, 3)
        reconstructions = decode(codes, tokenizer, config)
    grid = mask.view(tokenizer.code_shape).numpy()
    sampled = ~in_pixels(grid, tokenizer.resolution)
    figures = {
        "kept_codes": f"{int(mask.sum())} of {len(mask)}",
        "psnr": psnr_of_part(pixels, images, sampled),
        "psnr_of_the_tokenizer": psnr_of_part(pixels, reconstructions[:, None], sampled),
    }
    write_unfinished_record(result, provenance)
    write_png(output_dir / "completions.png", picture(pixels, images, grid))
    write_arrays(output_dir / "inputs.npz", {"arr_0": pixels})
    input_indices = np.repeat(np.arange(len(pixels)), images.shape[1]).astype(np.int64)
    write_arrays(result, {"arr_0": images.reshape(-1, *pixels.shape[1:]), "arr_1": input_indices, "kept": grid})
    fault_point("record", 0)
    files = [output_dir / "inputs.npz", result, output_dir / "completions.png"]
    write_record(result, provenance, figures={**figures, **code_facts()}, files=files)
    print(
        f"{output_dir}: kept {figures['kept_codes']} tokens; of the sampled region psnr {figures['psnr']:.2f} dB, "
        f"psnr_of_the_tokenizer {figures['psnr_of_the_tokenizer']:.2f} dB"
    )


def sample_completions(codes: Tensor, mask: Tensor, model: ReAR, config: CompleteImagesConfig) -> Tensor:
    """Codes (n, K, N) of K completions of codes (n, N), both on the CPU; `mask` (N,) bool: conditioning tokens."""
    count = len(codes) * config.completion.num_completions
    steps = -(-count // config.sampling.per_gpu_batch_size) * codes.shape[1]
    with tqdm(desc="sampling", total=steps, unit="token") as progress:
        sampler = CodeSampler(model, config.model.generator, compile_mode=config.sampling.compile)
        completed = inpaint(
            codes,
            mask,
            sampler,
            config,
            num_completions=config.completion.num_completions,
            class_label=config.completion.class_label,
            on_step=progress.update,
        )
    assert torch.equal(completed[:, :, mask], codes[:, None, mask].expand(-1, completed.shape[1], -1))
    return completed


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_npz(path, {name: (array.shape, array.dtype, [array]) for name, array in arrays.items()})


def conditioning_mask(keep: str, config: Config, tokenizer: Tokenizer) -> Tensor:
    """Mask (N,) bool of the conditioning tokens that `completion.keep` names; raises InputError for an invalid value,
    all or no tokens, or a region that the model cannot condition on."""
    if len(tokenizer.code_shape) != 2:
        raise InputError(f"completion.keep: found codes of shape {tokenizer.code_shape}, expected a grid of rows")
    rows, columns = tokenizer.code_shape
    region = REGION.fullmatch(keep)
    if region:
        grid = region_mask(region[1], float(region[2]), rows, columns)
    elif Path(keep).is_file():
        grid = read_mask(Path(keep), rows, columns)
    else:
        expected = "top:SHARE, left:SHARE, center:SHARE or border:SHARE with a share between 0 and 1, or a picture"
        raise InputError(f"completion.keep={keep}: expected {expected}")
    mask = torch.from_numpy(grid).flatten()
    if mask.all() or not mask.any():
        raise InputError(
            f"completion.keep={keep}: keeps {int(mask.sum())} of {len(mask)} tokens, expected some, not all"
        )
    order = config.model.generator.order
    is_prefix = torch.equal(conditioning_first(mask[None], None)[0], torch.arange(len(mask)))
    if order == "raster" and not is_prefix:
        raise InputError(
            f"completion.keep={keep}: expected top:SHARE, as model.generator.order=raster: a model that was trained in "
            "raster order alone can only sample what follows the conditioning tokens"
        )
    if order == "annealed" and not is_prefix:
        print(f"completion.keep={keep}: at the end of an annealed run, weights support raster order only (top:SHARE)")
    return mask


def read_mask(path: Path, rows: int, columns: int) -> np.ndarray:
    """Mask (rows, columns) bool of a square picture: where its mean is nearer to white than to black. Raises InputError
    for a missing or non-square picture."""
    try:
        with Image.open(path) as image:
            grey = image.convert("L")
    except Exception as error:  # damaged files raise errors of many kinds
        raise InputError(
            f"completion.keep={path}: found no picture that can be read ({type(error).__name__})"
        ) from error
    if grey.width != grey.height:
        raise InputError(f"completion.keep={path}: found {grey.width} x {grey.height} pixels, expected a square")
    return np.asarray(grey.resize((columns, rows), Image.Resampling.BOX)) > GREY


def load_model(weights: TrainedWeights, config: CompleteImagesConfig) -> ReAR:
    """Raises InputError for weights of a different model, or an unknown class label."""
    label, num_classes = config.completion.class_label, config.model.generator.condition_num_classes
    if label is not None and label >= num_classes:
        raise InputError(f"completion.class_label={label}: expected 0 to {num_classes - 1}, or null for the null class")
    check_classes(weights, asked=[] if label is None else [label])
    return load_generator(weights.path, config.model)


def read_inputs(config: CompleteImagesConfig) -> np.ndarray:
    """Centre crops (n, H, W, 3) uint8 of the first images of `completion.inputs`; raises InputError for a missing key,
    no images, or an unreadable one."""
    if config.completion.inputs is None:
        raise InputError("completion.inputs: missing; give a folder of images or tar shards")
    path = Path(config.completion.inputs)
    preprocessing = config.dataset.preprocessing
    decoding = ImageDecoding.of(preprocessing)
    source = PlainFolder(path) if is_plain(path) else open_images(str(path), decoding=decoding)
    source.decoding = decoding
    transform = center_crop_transform(preprocessing)
    dataset = ImageDataset(source, transform, seed=0)
    images = []
    for index in tqdm(range(min(len(source), config.completion.num_images)), "inputs", unit="image"):
        images.append(dataset[index]["image"].numpy())
    return np.stack(images)


def provenance_of(
    config: CompleteImagesConfig, pixels: np.ndarray, mask: Tensor, model: ReAR, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Everything that the completions depend on."""
    generator, sampling, completion = config.model.generator, config.sampling, config.completion
    return {
        "sha256 of the inputs": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "conditioning mask": "".join(str(int(kept)) for kept in mask),
        **{f"completion.{key}": getattr(completion, key) for key in ("num_completions", "class_label")},
        **{f"model.generator.{key}": getattr(generator, key) for key in ("order", *SAMPLING_NAMES)},
        **{f"sampling.{key}": getattr(sampling, key) for key in ("seed", "order", "uint8_rule")},
        "sha256 of experiment.generator_checkpoint": weights_sha256(model),
        "sha256 of experiment.tokenizer_checkpoint": tokenizer.sha256(),
    }


def batch_slices(count: int, config: Config, title: str) -> tqdm:
    """The slices of batches of `count` rows, with a progress bar."""
    size = config.sampling.per_gpu_batch_size
    return tqdm([slice(start, start + size) for start in range(0, count, size)], title, unit="batch")


@torch.inference_mode()
def encode(pixels: np.ndarray, tokenizer: Tokenizer, config: Config) -> Tensor:
    """Codes (n, N), on the CPU."""
    device = next(tokenizer.parameters()).device
    codes = []
    for batch in batch_slices(len(pixels), config, "encoding"):
        images = to_float(torch.from_numpy(pixels[batch]).to(device))
        codes.append(tokenizer.encode(images).cpu())
    return torch.cat(codes)


def decode(codes: Tensor, tokenizer: Tokenizer, config: Config) -> np.ndarray:
    """Images (len(codes), H, W, 3) uint8; raises InputError for logits or pixels that are not finite."""
    decoder = ImageDecoder(tokenizer, config.sampling.uint8_rule)
    device = next(tokenizer.parameters()).device
    images = []
    try:
        for batch in batch_slices(len(codes), config, "decoding"):
            images.append(decoder.finish(decoder.start(codes[batch].to(device))))
    except NonFiniteError as error:
        raise InputError(
            f"{error} (experiment.generator_checkpoint={config.experiment.generator_checkpoint})"
        ) from error
    return np.concatenate(images)


def in_pixels(grid: np.ndarray, resolution: int) -> np.ndarray:
    """Mask (H, W) of the pixels of the tokens in a mask (rows, columns)."""
    return grid.repeat(resolution // len(grid), axis=0).repeat(resolution // grid.shape[1], axis=1)


def picture(inputs: np.ndarray, images: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A row for each of the first images: input, conditioning region, completions."""
    inputs, images = inputs[:GRID_ROWS], images[:GRID_ROWS]
    kept = np.where(in_pixels(mask, inputs.shape[1])[..., None], inputs, np.uint8(GREY))
    rows = np.concatenate([inputs[:, None], kept[:, None], images], axis=1)
    return make_grid(rows.reshape(-1, *inputs.shape[1:]), rows.shape[1])


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
