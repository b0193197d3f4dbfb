"""Crops against ADM's rule written with arrays, and the ten crops' places."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.transforms import (
    NUM_DRAWS,
    adm_center_crop,
    center_flip,
    pretokenize_transform,
    ten_crop,
    training_transform,
)
from utils.errors import InputError
from utils.schema import PreprocessingConfig


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's rule (guided_diffusion/image_datasets.py), step by step."""
    while min(image.size) >= 2 * size:
        pixels = np.asarray(image).astype(int)
        pixels = (pixels[:, 0::2] + pixels[:, 1::2] + 1) // 2  # pillow rounds after each direction
        pixels = (pixels[0::2] + pixels[1::2] + 1) // 2
        image = Image.fromarray(pixels.astype(np.uint8))
    scale = size / min(*image.size)
    image = image.resize(tuple(round(edge * scale) for edge in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (50, 33), (33, 51), (132, 64), (128, 200), (256, 256), (20, 9)]
)
def test_center_crop_is_adm(width: int, height: int) -> None:
    image = noise(width, height)
    crop = adm_center_crop(image, 32)
    assert crop.size == (32, 32)
    np.testing.assert_array_equal(np.asarray(crop), reference_center_crop(image, 32))


def test_resize_to_keeps_a_margin() -> None:
    image = noise(40, 40)
    np.testing.assert_array_equal(np.asarray(adm_center_crop(image, 32, resize_to=40)), np.asarray(image)[4:36, 4:36])


def test_ten_crop_places() -> None:
    size, whole = 20, 22  # int(1.1 * 20)
    image = noise(whole, whole)
    pixels = np.asarray(image)
    mirrored = pixels[:, ::-1]
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    expected = [p[y : y + size, x : x + size] for p in (pixels, mirrored) for y, x in corners]
    crops = ten_crop(image, size)
    assert len(crops) == 10
    for crop, pixels in zip(crops, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(crop), pixels)
    assert ten_crop(noise(400, 300), 256)[0].size == (256, 256)


def test_center_flip() -> None:
    crop, mirrored = (np.asarray(image) for image in center_flip(noise(32, 32), 32))
    np.testing.assert_array_equal(mirrored, crop[:, ::-1])


@pytest.mark.parametrize(("crops", "count"), [("center", 1), ("center_flip", 2), ("ten_crop", 10)])
def test_pretokenize_transform(crops: str, count: int) -> None:
    transform = pretokenize_transform(PreprocessingConfig(32, 32, pretokenize_crops=crops))
    images = transform(noise(50, 40), np.zeros(NUM_DRAWS))
    assert images.shape == (count, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def test_training_transform_of_a_fitting_tile_is_the_identity() -> None:
    image = noise(64, 64)
    result = training_transform(PreprocessingConfig(64, 64, False, False))(image, np.zeros(NUM_DRAWS))
    torch.testing.assert_close(result, torch.from_numpy(np.asarray(image) / np.float32(255)).permute(2, 0, 1))


def test_random_crop_and_flip_are_uniform() -> None:
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))  # 4 wide, 3 high; every pixel tells its place
    image = grey.convert("RGB")
    transform = training_transform(PreprocessingConfig(3, 2, True, True))
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(1200):
        corner = tuple((transform(image, rng.random(NUM_DRAWS))[0, 0] * 255).round().int().tolist())
        seen[corner] = seen.get(corner, 0) + 1
    straight = {(y * 4 + x, y * 4 + x + 1) for y in range(2) for x in range(3)}
    assert set(seen) == straight | {pair[::-1] for pair in straight}
    assert all(60 < count < 140 for count in seen.values())


def test_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match=r"crop_size=64: expected at most resize_shorter_edge=32"):
        training_transform(PreprocessingConfig(32, 64))
