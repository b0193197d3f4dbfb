"""What every source of images offers: random access by index, whatever the files look like."""

import hashlib
import io
from abc import ABC, abstractmethod

import numpy as np
from PIL import Image

from utils.errors import InputError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class ImageSource(ABC):
    """n images with class ids. `source[i]` is (PIL RGB image, class id); sources can be pickled and forked.

    Attributes:
        class_ids: (n,) int32.
        class_names: names in the order of the class ids, or None if the files do not tell.
    """

    class_ids: np.ndarray
    class_names: list[str] | None

    @abstractmethod
    def key(self, index: int) -> str:
        """Name of an image, unique within the source."""

    @abstractmethod
    def location(self, index: int) -> str:
        """File, and member if there is one, for error messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal keys and class ids in equal order; the pixels are not read."""
        digest = hashlib.sha256(self.class_ids.tobytes())
        for index in range(len(self)):
            digest.update(self.key(index).encode() + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one image.

        Raises:
            InputError: the image cannot be read or decoded.
        """
        encoded = self.read(index)
        try:
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, Image.UnidentifiedImageError)  # its text is an object's address
            problem = "no known format" if unknown else str(error).splitlines()[0]
            raise InputError(
                f"{self.location(index)}: cannot decode the image of {len(encoded)} bytes: {problem}"
            ) from error
        return image, int(self.class_ids[index])
