"""Float images to bytes and back, grids of images, PNG files."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from utils.errors import NonFiniteError
from utils.files.atomic import atomic_file

GRID_GAP = 2  # white pixels between the images of a grid
CAPTION_HEIGHT = 12  # pixels
TITLE_HEIGHT = 14  # pixels above a grid
ROWS_BY_CLASS = 6


def to_uint8(images: Tensor, rule: str = "truncate") -> np.ndarray:
    """`to_byte_tensor` as an array; raises NonFiniteError for NaN or infinite pixels, which would become black or
    white."""
    if not images.isfinite().all():
        raise NonFiniteError("the pixels of a batch are not finite: the weights are damaged")
    return to_byte_tensor(images, rule).cpu().numpy()


def to_byte_tensor(images: Tensor, rule: str = "truncate") -> Tensor:
    """Bytes of float images in [0, 1], on their device; values outside are clamped.

    Args:
        images: (B, 3, H, W) float.
        rule: truncate (x * 255 cast to an integer, as the published sampler) or round (to the nearest).

    Returns:
        (B, H, W, 3) uint8.
    """
    if rule not in ("truncate", "round"):
        raise ValueError(f"uint8 rule {rule!r}: expected truncate or round")
    scaled = images.float().clamp(0, 1) * 255
    scaled = scaled.round() if rule == "round" else scaled
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3)


def to_float(images: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) as float32 (B, 3, H, W) in [0, 1], the nearest numbers to byte / 255; on their device."""
    values = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # CUDA multiplies by the reciprocal of a Python number, which rounds differently; it divides by a tensor.
    return values.div_(torch.full((), 255.0, device=images.device))


def make_grid(images: np.ndarray, columns: int) -> Image.Image:
    """Images (B, H, W, 3) uint8 in rows on white."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    step_y, step_x = height + GRID_GAP, width + GRID_GAP
    canvas = np.full((rows * step_y - GRID_GAP, columns * step_x - GRID_GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * step_y, (i % columns) * step_x
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def make_captioned_grid(images: np.ndarray, captions: list[str], columns: int) -> Image.Image:
    """Like `make_grid`, with a caption below each image, cut to its width."""
    count, _, width, _ = images.shape
    below = np.full((count, CAPTION_HEIGHT, width, 3), 255, np.uint8)
    for strip, caption in zip(below, captions, strict=True):
        picture = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
        ImageDraw.Draw(picture).text((0, 0), caption, fill="black")
        strip[:] = np.asarray(picture)
    return make_grid(np.concatenate([images, below], axis=1), columns)


def samples_by_class(npz: Mapping[str, np.ndarray], class_names: list[str]) -> Image.Image:
    """The first samples, a column for each class under its name; image i has class i mod C."""
    columns = len(class_names)
    images = npz["arr_0"][: ROWS_BY_CLASS * columns]
    grid = make_grid(images, columns)
    picture = Image.new("RGB", (grid.width, grid.height + TITLE_HEIGHT), "white")
    picture.paste(grid, (0, TITLE_HEIGHT))
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(class_names):
        draw.text((column * (images.shape[2] + GRID_GAP), 1), name, fill="black")
    return picture


def save_grid(images: np.ndarray, path: str | Path, columns: int | None = None) -> None:
    """Write images (B, H, W, 3) uint8 as one PNG picture; `columns` None: about as many as rows."""
    write_png(Path(path), make_grid(images, columns or math.ceil(len(images) ** 0.5)))


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically."""
    with atomic_file(path) as partial:
        image.save(partial, format="png")
