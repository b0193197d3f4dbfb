"""Crops against ADM's rule written with arrays, and the positions of the ten crops."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from data.images.transforms import NUM_DRAWS, adm_center_crop, cut_crops, pretokenize_transform, training_transform
from utils.errors import InputError
from utils.images import to_float
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


def crops_of(image: Image.Image, preprocessing: PreprocessingConfig) -> torch.Tensor:
    """Float crops (K, 3, H, W), as the tokenizer gets them."""
    sent = pretokenize_transform(preprocessing)(image, np.zeros(NUM_DRAWS))
    assert sent.dtype == torch.uint8
    return to_float(cut_crops(sent[None], preprocessing)[0])


@pytest.mark.parametrize("size", [20, 16, 24])  # of 22, 17 and 26 pixels: the centre of 17 is between two pixels
def test_ten_crop_is_torchvisions_to_the_bit(size: int) -> None:
    image = noise(50, 40)
    whole = adm_center_crop(image, int(1.1 * size))
    expected = torch.stack([F.to_tensor(crop) for crop in F.ten_crop(whole, size)])
    crops = crops_of(image, PreprocessingConfig(resize_shorter_edge=32, crop_size=size, pretokenize_crops="ten_crop"))
    assert crops.is_contiguous()
    assert torch.equal(crops, expected)


def test_center_flip() -> None:
    image = noise(50, 40)
    both = crops_of(image, PreprocessingConfig(resize_shorter_edge=36, crop_size=32, pretokenize_crops="center_flip"))
    assert torch.equal(both[0], F.to_tensor(adm_center_crop(image, 32, 36)))
    assert torch.equal(both[1], both[0].flip(-1))
    assert torch.equal(
        crops_of(image, PreprocessingConfig(resize_shorter_edge=36, crop_size=32, pretokenize_crops="center")), both[:1]
    )


def test_training_transform_of_a_fitting_tile_is_the_identity() -> None:
    image = noise(64, 64)
    result = training_transform(
        PreprocessingConfig(resize_shorter_edge=64, crop_size=64, random_crop=False, random_flip=False)
    )(image, np.zeros(NUM_DRAWS))
    np.testing.assert_array_equal(result, np.asarray(image))


def test_random_crop_and_flip_are_uniform() -> None:
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))  # 4 wide, 3 high; values are positions
    image = grey.convert("RGB")
    transform = training_transform(
        PreprocessingConfig(resize_shorter_edge=3, crop_size=2, random_crop=True, random_flip=True)
    )
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(1200):
        corner = tuple(transform(image, rng.random(NUM_DRAWS))[0, :, 0].tolist())
        seen[corner] = seen.get(corner, 0) + 1
    straight = {(y * 4 + x, y * 4 + x + 1) for y in range(2) for x in range(3)}
    assert set(seen) == straight | {pair[::-1] for pair in straight}
    assert all(60 < count < 140 for count in seen.values())


def test_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match=r"crop_size=64: expected at most resize_shorter_edge=32"):
        training_transform(PreprocessingConfig(resize_shorter_edge=32, crop_size=64))
