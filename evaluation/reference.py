"""Write a reference file: Inception statistics of all images, and some of the images for precision and recall."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation.collect import Images, collect
from evaluation.features import Extractor
from utils.distributed import DistributedContext
from utils.files.npz import write_npz

CHUNK_IMAGES = 100  # written at a time


def make_reference(
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
