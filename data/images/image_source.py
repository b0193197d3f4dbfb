"""What every source of images offers: random access by index, whatever the files look like."""

import errno
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.images.image_io import ImageDecoding, Note
from utils.errors import InputError

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)  # no fault of the image whose turn it is


class ImageSource(ABC):
    """n images with class ids. `source[i]` is (PIL RGB image, class id); sources can be pickled and forked.

    Attributes:
        class_ids: (n,) int32.
        class_names: names in the order of the class ids, or None if the files do not tell.
        decoding: how files become pixels.
    """

    class_ids: np.ndarray
    class_names: list[str] | None
    decoding: ImageDecoding = ImageDecoding()

    @abstractmethod
    def key(self, index: int) -> str:
        """Name of an image, unique within the source; bytes that are no UTF-8 as `surrogateescape` gives them."""

    @abstractmethod
    def location(self, index: int) -> str:
        """File, and member if there is one, for error messages."""

    @abstractmethod
    def _read(self, index: int) -> bytes: ...

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            InputError: the file cannot be read.
            OSError: this process has too many open files.
        """
        try:
            return self._read(index)
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                raise
            raise InputError(f"{self.location(index)}: cannot be read: {error.strerror or error}") from error

    @property
    def fingerprint(self) -> str:
        """Equal for equal keys and class ids in equal order; the pixels are not read."""
        digest = hashlib.sha256(self.class_ids.tobytes())
        for index in range(len(self)):
            digest.update(to_bytes(self.key(index)) + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image and its class id.

        Raises:
            InputError: it cannot be read or decoded.
        """
        return self.load(index)[0], int(self.class_ids[index])

    def load(self, index: int) -> tuple[Image.Image, Note]:
        """An image, and what was done to it beyond the ordinary.

        Raises:
            InputError: it cannot be read or decoded.
        """
        encoded = self.read(index)
        try:
            return self.decoding.decode(encoded)
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes raise whatever Pillow's readers did not think of
            unknown = isinstance(error, Image.UnidentifiedImageError)  # its text is an object's address
            problem = "no known format" if unknown else (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{self.location(index)}: cannot decode the image of {len(encoded)} bytes: {problem}"
            ) from error

    def name_classes(self, class_names: Sequence[str], origin: str) -> None:
        """Number the classes as another source does, by their names. Without names, class ids stay as they are.

        Raises:
            InputError: a class that `class_names` lacks, or has twice.
        """
        if self.class_names is None or self.class_names == list(class_names):
            return
        ids = {name: class_id for class_id, name in enumerate(class_names)}
        used = [self.class_names[class_id] for class_id in np.unique(self.class_ids).tolist()]
        wrong = [name for name in used if name not in ids or class_names.count(name) > 1]
        if wrong:
            raise InputError(
                f"{self.location(0)}: found {len(wrong)} class names that {origin} lacks or has twice, such as "
                f"{wrong[0]!r}; expected names as there, such as {class_names[0]!r}"
            )
        new_ids = np.array([ids.get(name, -1) for name in self.class_names], dtype=np.int32)
        self.class_ids, self.class_names = new_ids[self.class_ids], list(class_names)


def to_bytes(name: str) -> bytes:
    """A file name as it is on disk."""
    return name.encode("utf-8", "surrogateescape")


def to_text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """Bytes that are no UTF-8 become \\xNN, and control characters such as the end of a line their escapes."""
    text = to_bytes(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
