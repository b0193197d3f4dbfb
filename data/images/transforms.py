"""Crops: how an image of any size becomes the square that the tokenizer reads.

A transform is a function of (image, draws): `NUM_DRAWS` uniforms in [0, 1) that belong to the image and the pass, so
that its result does not depend on workers. The centre crop is that of ADM (openai/guided-diffusion,
guided_diffusion/image_datasets.py), the ten crops are those of LlamaGen and RAR: ADM centre crop to 1.1 times the size,
then five crops and their mirror images.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

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
    """ADM's centre crop of `size` x `size` pixels, of the image with shorter edge `resize_to` (None: size)."""
    image = resize_shorter_edge(image, size if resize_to is None else resize_to)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def center_flip(image: Image.Image, size: int, resize_to: int | None = None) -> list[Image.Image]:
    """The centre crop and its mirror image."""
    crop = adm_center_crop(image, size, resize_to)
    return [crop, ImageOps.mirror(crop)]


def ten_crop(image: Image.Image, size: int) -> list[Image.Image]:
    """Top left, top right, bottom left, bottom right and centre of ADM's centre crop to 1.1 * size; then the same of
    its mirror image. torchvision's ten_crop gives the same; importing that takes longer than all else at the start."""
    whole = adm_center_crop(image, int(TEN_CROP_RATIO * size))
    end, middle = whole.width - size, round((whole.width - size) / 2)
    places = [(0, 0), (end, 0), (0, end), (end, end), (middle, middle)]
    return [_crop(view, *place, size) for view in (whole, ImageOps.mirror(whole)) for place in places]


def training_transform(preprocessing: PreprocessingConfig) -> Transform:
    """Resize, random or centre crop, random flip: an image to float32 (3, crop_size, crop_size) in [0, 1].

    Raises:
        InputError: the crop is larger than the resized image.
    """
    _check_sizes(preprocessing)
    return partial(_random_view, preprocessing=preprocessing)  # unlike an inner function, it can be pickled


def pretokenize_transform(preprocessing: PreprocessingConfig) -> Transform:
    """The crops of `pretokenize_crops`: an image to float32 (K, 3, crop_size, crop_size) in [0, 1], nothing random.

    K is 1 for center, 2 for center_flip and 10 for ten_crop, which resizes by itself.

    Raises:
        InputError: the crop is larger than the resized image.
    """
    _check_sizes(preprocessing)
    return partial(_fixed_views, preprocessing=preprocessing)


def _random_view(image: Image.Image, draws: np.ndarray, preprocessing: PreprocessingConfig) -> Tensor:
    size, resize_to = preprocessing.crop_size, preprocessing.resize_shorter_edge
    if preprocessing.random_crop:
        image = resize_shorter_edge(image, resize_to)
        left, top = int(draws[0] * (image.width - size + 1)), int(draws[1] * (image.height - size + 1))
        image = _crop(image, left, top, size)
    else:
        image = adm_center_crop(image, size, resize_to)
    if preprocessing.random_flip and draws[2] < 0.5:
        image = ImageOps.mirror(image)
    return _to_tensor(image)


def _fixed_views(image: Image.Image, draws: np.ndarray, preprocessing: PreprocessingConfig) -> Tensor:
    size, resize_to = preprocessing.crop_size, preprocessing.resize_shorter_edge
    if preprocessing.pretokenize_crops == "ten_crop":
        crops = ten_crop(image, size)
    elif preprocessing.pretokenize_crops == "center_flip":
        crops = center_flip(image, size, resize_to)
    else:
        crops = [adm_center_crop(image, size, resize_to)]
    return torch.stack([_to_tensor(crop) for crop in crops])


def _to_tensor(image: Image.Image) -> Tensor:
    """float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _check_sizes(preprocessing: PreprocessingConfig) -> None:
    if preprocessing.crop_size > preprocessing.resize_shorter_edge:
        raise InputError(
            f"dataset.preprocessing.crop_size={preprocessing.crop_size}: expected at most "
            f"resize_shorter_edge={preprocessing.resize_shorter_edge}"
        )
