"""Crops: from an image of any size to the square that the tokenizer reads.

A transform is a function of (image, draws): `NUM_DRAWS` uniforms in [0, 1) keyed by image and pass, so the result does
not depend on the worker. It returns bytes, which are the least to send; crops are cut after sending.

Sources: centre crop of ADM (openai/guided-diffusion, guided_diffusion/image_datasets.py); ten crops of LlamaGen and
RAR: ADM centre crop to 1.1 times the size, then five crops and their mirror images.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.images.image_io import ImageDecoding
from utils.errors import InputError
from utils.schema import PreprocessingConfig

TEN_CROP_RATIO = 1.1

NUM_DRAWS = 3  # left, top, mirrored or not
Transform = Callable[[Image.Image, np.ndarray], Tensor]


def resize_shorter_edge(image: Image.Image, edge: int) -> Image.Image:
    """Halve by 2x2 means while the shorter edge is at least `2 * edge` pixels, then resize bicubically to `edge`."""
    while min(image.size) >= 2 * edge:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = edge / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def adm_center_crop(image: Image.Image, size: int, resize_to: int | None = None) -> Image.Image:
    """ADM's centre crop of `size` x `size` pixels, of the image resized to shorter edge `resize_to` (None: size)."""
    image = resize_shorter_edge(image, size if resize_to is None else resize_to)
    return _crop(image, left=(image.width - size) // 2, top=(image.height - size) // 2, size=size)


def training_transform(preprocessing: PreprocessingConfig) -> Transform:
    """Resize, random or centre crop, random flip: an image to uint8 (crop_size, crop_size, 3)."""
    _check_sizes(preprocessing)
    return partial(_training_crop, preprocessing=preprocessing)  # unlike an inner function, it can be pickled


def center_crop_transform(preprocessing: PreprocessingConfig) -> Transform:
    """`training_transform` without randomness, for validation: a centre crop, never mirrored."""
    return training_transform(replace(preprocessing, random_crop=False, random_flip=False))


def pretokenize_transform(preprocessing: PreprocessingConfig) -> Transform:
    """The input of `cut_crops`: an image to uint8 (S, S, 3), not random. S is crop_size, for ten_crop 1.1 times it."""
    _check_sizes(preprocessing)
    return partial(_pretokenize_crop, preprocessing=preprocessing)


def crop_settings(preprocessing: PreprocessingConfig) -> dict[str, int | str | bool]:
    """By config key, everything that decides on the pixels of `pretokenize_transform` and `cut_crops`; decoding options
    only if they differ from the defaults, since stores from before these keys have none."""
    names = ["resize_shorter_edge", "crop_size", "pretokenize_crops"]
    names += [name for name, default in vars(ImageDecoding()).items() if getattr(preprocessing, name) != default]
    return {f"dataset.preprocessing.{name}": getattr(preprocessing, name) for name in names}


def cut_crops(images: Tensor, preprocessing: PreprocessingConfig) -> Tensor:
    """The K crops of `pretokenize_crops`, of results of `pretokenize_transform`: (B, S, S, 3) to (B, K, size, size, 3).

    ten_crop: top left, top right, bottom left, bottom right, centre, and the same five crops of the mirror image, as in
    torchvision. (Mirroring the five crops would differ: the centre may lie between two pixels.)
    """
    size = preprocessing.crop_size
    corners = [(0, 0)]
    if preprocessing.pretokenize_crops == "ten_crop":
        end = images.shape[2] - size
        middle = round(end / 2)
        corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    views = [images] if preprocessing.pretokenize_crops == "center" else [images, images.flip(2)]
    crops = [view[:, top : top + size, left : left + size] for view in views for top, left in corners]
    return torch.stack(crops, dim=1)


def _training_crop(image: Image.Image, draws: np.ndarray, preprocessing: PreprocessingConfig) -> Tensor:
    size, resize_to = preprocessing.crop_size, preprocessing.resize_shorter_edge
    if preprocessing.random_crop:
        image = resize_shorter_edge(image, resize_to)
        left, top = int(draws[0] * (image.width - size + 1)), int(draws[1] * (image.height - size + 1))
        image = _crop(image, left, top, size)
    else:
        image = adm_center_crop(image, size, resize_to)
    if preprocessing.random_flip and draws[2] < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image))


def _pretokenize_crop(image: Image.Image, draws: np.ndarray, preprocessing: PreprocessingConfig) -> Tensor:
    size, resize_to = preprocessing.crop_size, preprocessing.resize_shorter_edge
    if preprocessing.pretokenize_crops == "ten_crop":
        size = resize_to = int(TEN_CROP_RATIO * size)
    return torch.from_numpy(np.array(adm_center_crop(image, size, resize_to)))


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _check_sizes(preprocessing: PreprocessingConfig) -> None:
    if preprocessing.crop_size > preprocessing.resize_shorter_edge:
        raise InputError(
            f"dataset.preprocessing.crop_size={preprocessing.crop_size}: expected at most "
            f"resize_shorter_edge={preprocessing.resize_shorter_edge}"
        )
