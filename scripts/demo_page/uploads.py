"""Files that visitors of the page send: none of them is decoded before its size is known."""

import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from data.images.image_io import ImageDecoding
from data.images.transforms import NUM_DRAWS, training_transform
from utils.errors import InputError
from utils.schema import PreprocessingConfig

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000  # 200 MB of RGBA
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others, such as EPS, may start programs


def bound_all_pictures() -> None:
    """From now on Pillow refuses pictures with too many pixels in this process, whoever opens them."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def read_upload(path: Path, preprocessing: PreprocessingConfig) -> np.ndarray:
    """The centre crop (H, W, 3) uint8 of a picture.

    Raises:
        InputError: too many bytes, too many pixels, several frames, or no picture that can be read.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path.name}: found {size} bytes, expected at most {MAX_BYTES}")
    encoded, decoding = path.read_bytes(), ImageDecoding.of(preprocessing)
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            (width, height), frames = image.size, getattr(image, "n_frames", 1)
            if image.format == "MPO":  # a photo and its previews
                frames = 1
        one = decoding.decode(encoded) if frames == 1 and width * height <= MAX_PIXELS else None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path.name}: {error}") from error
    except Exception as error:  # damaged files make Pillow's readers raise errors of many kinds
        raise InputError(f"{path.name}: found no picture that can be read, expected {', '.join(FORMATS)}") from error
    if one is None:
        found = f"{frames} frames of {width} x {height} pixels"
        raise InputError(f"{path.name}: found {found}, expected one of at most {MAX_PIXELS} pixels")
    center_crop = training_transform(dataclasses.replace(preprocessing, random_crop=False, random_flip=False))
    return center_crop(one, np.zeros(NUM_DRAWS)).numpy()
