"""Sample images from a trained reAR model into one npz for the ADM evaluator.

    PYTHONPATH=. torchrun --nproc_per_node=8 scripts/sample_imagenet_rear.py config=configs/rear_b.yaml \\
        experiment.output_dir=outputs/rear_b_samples experiment.generator_checkpoint=outputs/rear_b

Image i has class i mod C and depends on (weights, config, sampling.seed, i) only, so any number of processes and any
batch size give the same images, and no block of the file is sorted by class (the Inception Score needs that).

Writes `<output_dir>.npz` (arr_0: uint8 NHWC images, arr_1: int64 labels), `<output_dir>.png` (the first images, a grid)
and `<output_dir>.yaml` (the resolved config). While it runs, finished batches lie in `<output_dir>.parts/`.
"""

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    from utils.config import check_tokenizer_fits, load_config_or_exit

    CONFIG = load_config_or_exit(check_tokenizer_fits)

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from modeling.generate import generate_images
from modeling.maskgit_vq import load_tokenizer
from modeling.rear import load_generator
from utils.config import Config, save_config
from utils.distributed import distributed
from utils.errors import InputError, input_errors_exit
from utils.images import make_grid
from utils.npz import write_npz

GRID_COLUMNS, GRID_IMAGES = 10, 50


def main(config: Config) -> None:
    if config.experiment.generator_checkpoint is None:
        raise InputError("experiment.generator_checkpoint: missing; give a weights file, a checkpoint or a run folder")
    output = Path(config.experiment.output_dir)
    parts = output.with_name(output.name + ".parts")
    tokenizer = load_tokenizer(config)
    model = load_generator(config.experiment.generator_checkpoint, config.model)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.enable_tf32
    with distributed() as world:
        if world.is_main_process:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
        world.barrier()
        model.to(world.device).eval()
        tokenizer.to(world.device)
        first, last = (config.sampling.num_fid_samples * r // world.world_size for r in (world.rank, world.rank + 1))
        batch_size = config.sampling.per_gpu_batch_size
        for start in tqdm(range(first, last, batch_size), unit="batch", disable=not world.is_main_process):
            indices = list(range(start, min(start + batch_size, last)))
            images = generate_images(model, tokenizer, indices, config)
            save_part(parts / f"{start:09d}.npy", images)
        world.barrier()
        if world.is_main_process:
            pack(parts, output, config)


def save_part(path: Path, images: np.ndarray) -> None:
    """Write (B, H, W, 3) uint8 so that the file exists only when it is complete."""
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        np.save(file, images)
    os.replace(partial, path)


def pack(parts: Path, output: Path, config: Config) -> None:
    """Gather the parts into the npz, a part at a time, and remove them."""
    files = sorted(parts.glob("*.npy"))
    n = config.sampling.num_fid_samples
    found = sum(len(np.load(file, mmap_mode="r")) for file in files)
    assert found == n, f"{parts} holds {found} images, expected {n}"
    image_shape = np.load(files[0], mmap_mode="r").shape[1:]
    labels = np.arange(n) % config.model.generator.condition_num_classes
    npz = output.with_name(output.name + ".npz")
    write_npz(
        npz,
        {
            "arr_0": ((n, *image_shape), np.uint8, (np.load(file) for file in tqdm(files, desc=npz.name))),
            "arr_1": (labels.shape, np.int64, [labels]),
        },
    )
    save_config(config, output.with_name(output.name + ".yaml"))
    grid = make_grid(np.stack(list(first_images(files, GRID_IMAGES))), GRID_COLUMNS)
    grid.save(output.with_name(output.name + ".png"))
    shutil.rmtree(parts)
    print(f"{n} images in {npz}")


def first_images(files: list[Path], count: int) -> Iterator[np.ndarray]:
    for file in files:
        images = np.load(file)[:count]
        count -= len(images)
        yield from images
        if count == 0:
            return


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
