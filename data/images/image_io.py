"""From the bytes of an image file to 8-bit RGB pixels: one rule for every script that reads images.

Images of 8 bits without transparency are converted by Pillow's `convert("RGB")`, as in ADM; colour profiles are not
applied. For other images see `ImageDecoding.decode`.
"""

import io
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import get_args, get_type_hints

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from utils.errors import InputError
from utils.schema import PreprocessingConfig

COLOURS = get_args(get_type_hints(PreprocessingConfig)["background"])  # for transparent pixels
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "jfif", "jpe", "bmp", "gif", "tif", "tiff"),
    *("jp2", "avif", "ppm", "pgm", "pbm", "pnm", "tga"),
)
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
MAX_ASPECT_RATIO = 100  # enlarging the shorter edge of a longer image to the crop size costs gigabytes


@dataclass(frozen=True)
class ImageDecoding:
    """
    Args:
        background: name of the colour behind transparent pixels.
        exif_orientation: rotate images by their EXIF entry.
    """

    background: str = "white"
    exif_orientation: bool = False

    @classmethod
    def of(cls, preprocessing: PreprocessingConfig) -> "ImageDecoding":
        return cls(background=preprocessing.background, exif_orientation=preprocessing.exif_orientation)

    def decode(self, encoded: bytes) -> Image.Image:
        """RGB: the upper 8 bits of 16-bit channels, the first of several frames, transparency over the background.

        Raises any exception of Pillow for damaged bytes, another format or too many pixels, InputError for pixels
        without a known range, such as floats, or an aspect ratio above `MAX_ASPECT_RATIO`.
        """
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=_formats())
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            size = f"{image.width} x {image.height} pixels"
            raise InputError(f"found {size}, expected at most {MAX_ASPECT_RATIO} times as long as wide")
        image.load()
        if self.exif_orientation:
            with suppress(Exception):  # a damaged EXIF block in an image whose pixels are fine
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            image = _upper_8_bits(image)
        if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
            with_alpha = image.convert("RGBA")
            if np.asarray(with_alpha)[..., 3].min() < 255:
                image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), with_alpha)
        return image.convert("RGB")


def has_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return PurePath(name).suffix[1:].lower() in IMAGE_EXTENSIONS


@cache
def _formats() -> list[str]:
    """Pillow's readers for the formats of `IMAGE_EXTENSIONS`; some other readers, such as EPS, start programs."""
    by_extension = Image.registered_extensions()
    known = {by_extension.get(f".{extension}") for extension in IMAGE_EXTENSIONS}
    return [name for name in Image.ID if name in known]  # in the order in which Pillow tries them


def _upper_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits, as Pillow converts 16-bit colours."""
    tags = getattr(image, "tag_v2", {})
    bits, zero_is_black = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(PHOTOMETRIC_INTERPRETATION, 1) == 1
    if image.mode == "F" or bits != 16 or not zero_is_black or (image.mode == "I" and image.format != "PPM"):
        raise InputError(f"found {bits}-bit grey of mode {image.mode}, expected 8 or 16 bits, unsigned, 0 for black")
    pixels, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((pixels >> 8).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey
