"""Build a reference file: Inception statistics of all images, and some of the images for precision and recall."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evaluation.collect import collect
from evaluation.features import Extractor
from utils.distributed import DistributedContext
from utils.files.npz import StoredImages, write_npz

CHUNK_IMAGES = 100  # written at a time


class ImageSource(Protocol):
    """Images of any size: `source[i]` is (PIL RGB image, class id)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class NpzSource:
    """The images of an npz as a source; the class id is always 0."""

    def __init__(self, images: StoredImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images.read(index, index + 1)[0]), 0


class CroppedImages:
    """A source cropped to one size when read; decoded by several threads."""

    def __init__(self, source: ImageSource, crop: Callable[[Image.Image], Image.Image]) -> None:
        self.source, self.crop = source, crop
        self.threads = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, uint8 (stop - start, H, W, 3)."""
        return self.load(range(start, stop))

    def load(self, indices: Iterable[int]) -> np.ndarray:
        """uint8 (len(indices), H, W, 3)."""
        return np.stack(list(self.threads.map(lambda index: np.asarray(self.crop(self.source[index][0])), indices)))


def make_reference(
    images: CroppedImages,
    extractor: Extractor,
    output: Path,
    ctx: DistributedContext,
    device: torch.device,
    batch_size: int,
    max_images: int,
) -> None:
    """Write mu, sigma, mu_s, sigma_s of all images and arr_0, at most `max_images` of them at equal steps.

    Every process of `ctx` calls it; rank 0 writes. The layout is that of guided-diffusion's reference batches
    (https://github.com/openai/guided-diffusion/tree/main/evaluations).
    """
    collected = collect(images, extractor, ctx, device, batch_size, "features")
    if not ctx.is_rank0:
        return
    assert collected.spatial is not None, "features of Inception"
    mu, sigma = collected.pool.mean_and_covariance()
    mu_s, sigma_s = collected.spatial.mean_and_covariance()
    n = min(len(images), max_images)
    indices = np.arange(n) * len(images) // n
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    entries = {key: (array.shape, array.dtype, [array]) for key, array in arrays.items()}
    shape = (n, *images.read(0, 1).shape[1:])
    write_npz(output, {"arr_0": (shape, np.uint8, _chunks(images, indices)), **entries})


def _chunks(images: CroppedImages, indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in tqdm(range(0, len(indices), CHUNK_IMAGES), desc="arr_0", unit="chunk"):
        yield images.load(indices[start : start + CHUNK_IMAGES])
