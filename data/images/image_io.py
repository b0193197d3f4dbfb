"""The one rule by which an image file becomes 8-bit RGB pixels; every script that reads images goes through it.

Images of 8 bits without transparency: the pixels that Pillow's `convert("RGB")` gives, as ADM reads them. Colour
profiles are not applied. The rest is in `ImageDecoding.decode`; what was done to an image is told by `Note`.
"""

import io
from dataclasses import dataclass
from enum import IntFlag
from pathlib import PurePath
from typing import get_args, get_type_hints

import numpy as np
from PIL import Image, ImageOps

from utils.schema import PreprocessingConfig

COLOURS = get_args(get_type_hints(PreprocessingConfig)["background"])  # for transparent pixels
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "jfif", "jpe", "bmp", "gif", "tif", "tiff"),
    *("jp2", "avif", "ppm", "pgm", "pbm", "pnm", "tga"),
)
ORIENTATION_TAG, BITS_TAG, ZERO_IS_TAG = 0x0112, 258, 262  # of EXIF and TIFF
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


class Note(IntFlag):
    """What a user may want to know about an image that was read."""

    UNREADABLE = 1
    TRANSPARENT = 2
    TURNED = 4
    NOT_TURNED = 8
    DEEP = 16
    FRAMES = 32


MEANINGS = {
    Note.UNREADABLE: "cannot be decoded: left out (dataset.params.on_bad_sample)",
    Note.TRANSPARENT: "transparency: composited on dataset.preprocessing.background",
    Note.TURNED: "EXIF orientation: applied (dataset.preprocessing.exif_orientation)",
    Note.NOT_TURNED: "EXIF orientation: ignored, as ADM does; dataset.preprocessing.exif_orientation=true applies it",
    Note.DEEP: "more than 8 bits of grey: the upper 8 were taken",
    Note.FRAMES: "several frames: the first was taken",
}


@dataclass(frozen=True)
class ImageDecoding:
    """
    Args:
        background: name of the colour behind transparent pixels.
        exif_orientation: turn images as their EXIF entry says.
    """

    background: str = "white"
    exif_orientation: bool = False

    @classmethod
    def of(cls, preprocessing: PreprocessingConfig) -> "ImageDecoding":
        return cls(preprocessing.background, preprocessing.exif_orientation)

    def decode(self, encoded: bytes) -> tuple[Image.Image, Note]:
        """Of 16-bit channels the upper 8 bits, the first of several frames, transparency over the background.

        Raises:
            ValueError: no known format, or pixels without a known range, such as floats.
            Exception: whatever Pillow's readers raise for damaged bytes.
        """
        image: Image.Image = Image.open(io.BytesIO(encoded))
        note = Note(0)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo and its previews
            note |= Note.FRAMES
        image.load()
        if _orientation(image) in range(2, 9):
            note |= Note.TURNED if self.exif_orientation else Note.NOT_TURNED
            if self.exif_orientation:
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            image, note = _upper_8_bits(image), note | Note.DEEP
        if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
            with_alpha = image.convert("RGBA")
            if np.asarray(with_alpha)[..., 3].min() < 255:
                background = Image.new("RGBA", image.size, self.background)
                image, note = Image.alpha_composite(background, with_alpha), note | Note.TRANSPARENT
        return image.convert("RGB"), note


def has_image_name(name: str) -> bool:
    """Whether a file's name ends as that of an image; one that is called `jpg` and no more does not."""
    return PurePath(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a damaged entry says nothing, and the pixels are good
        return 1


def _upper_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8, as Pillow does it for colours of 16 bits."""
    tags = getattr(image, "tag_v2", {})
    bits, zero_is_black = tags.get(BITS_TAG, (16,))[0], tags.get(ZERO_IS_TAG, 1) == 1
    if image.mode == "F" or bits != 16 or not zero_is_black or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(f"found {bits}-bit grey of mode {image.mode}, expected 8 or 16 bits, unsigned, 0 for black")
    pixels, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((pixels >> 8).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey
