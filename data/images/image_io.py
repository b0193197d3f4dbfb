"""From the bytes of an image file to 8-bit RGB pixels: one rule for every script that reads images.

Images of 8 bits without transparency become what Pillow's `convert("RGB")` gives, as in ADM. Colour profiles are not
applied. For other images see `ImageDecoding.decode`.
"""

import io
from dataclasses import dataclass
from enum import IntFlag
from pathlib import PurePath
from typing import get_args, get_type_hints

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from utils.schema import PreprocessingConfig

COLOURS = get_args(get_type_hints(PreprocessingConfig)["background"])  # for transparent pixels
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "jfif", "jpe", "bmp", "gif", "tif", "tiff"),
    *("jp2", "avif", "ppm", "pgm", "pbm", "pnm", "tga"),
)
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


class ImageIssue(IntFlag):
    """Why an image was skipped, or was not simply converted to RGB. The values are bits of one number per image."""

    UNREADABLE = 1
    TRANSPARENT = 2
    ROTATED = 4
    NOT_ROTATED = 8
    SIXTEEN_BITS = 16
    SEVERAL_FRAMES = 32


ISSUE_TEXT = {
    ImageIssue.UNREADABLE: "cannot be decoded: left out (dataset.params.on_bad_sample)",
    ImageIssue.TRANSPARENT: "transparency: composited on dataset.preprocessing.background",
    ImageIssue.ROTATED: "EXIF orientation: applied (dataset.preprocessing.exif_orientation)",
    ImageIssue.NOT_ROTATED: "EXIF orientation: ignored, as in ADM; to apply it: "
    "dataset.preprocessing.exif_orientation=true",
    ImageIssue.SIXTEEN_BITS: "16-bit grey: reduced to the upper 8 bits",
    ImageIssue.SEVERAL_FRAMES: "several frames: the first was used",
}


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

    def decode(self, encoded: bytes) -> tuple[Image.Image, ImageIssue]:
        """RGB: the upper 8 bits of 16-bit channels, the first of several frames, transparency over the background.

        Raises:
            ValueError: unknown format, or pixels without a known range, such as floats.
            Exception: any that Pillow raises for damaged bytes.
        """
        image: Image.Image = Image.open(io.BytesIO(encoded))
        issues = ImageIssue(0)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a photo and its previews
            issues |= ImageIssue.SEVERAL_FRAMES
        image.load()
        if _orientation(image) in range(2, 9):
            if self.exif_orientation:
                issues |= ImageIssue.ROTATED
                ImageOps.exif_transpose(image, in_place=True)
            else:
                issues |= ImageIssue.NOT_ROTATED
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            issues |= ImageIssue.SIXTEEN_BITS
            image = _upper_8_bits(image)
        if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
            with_alpha = image.convert("RGBA")
            if np.asarray(with_alpha)[..., 3].min() < 255:
                issues |= ImageIssue.TRANSPARENT
                image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), with_alpha)
        return image.convert("RGB"), issues


def has_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image; a file named just `jpg` has none."""
    return PurePath(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(Base.Orientation, 1)
    except Exception:  # a damaged EXIF block in an image whose pixels are fine
        return 1


def _upper_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits, as Pillow converts 16-bit colours."""
    tags = getattr(image, "tag_v2", {})
    bits, zero_is_black = tags.get(BITSPERSAMPLE, (16,))[0], tags.get(PHOTOMETRIC_INTERPRETATION, 1) == 1
    if image.mode == "F" or bits != 16 or not zero_is_black or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(f"found {bits}-bit grey of mode {image.mode}, expected 8 or 16 bits, unsigned, 0 for black")
    pixels, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((pixels >> 8).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey
