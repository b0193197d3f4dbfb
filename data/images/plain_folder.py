"""Images that lie in a folder without classes."""

from pathlib import Path

import numpy as np

from data.images.decoding import IMAGE_EXTENSIONS
from data.images.image_source import ImageSource, printable
from utils.errors import InputError


def has_images(folder: Path) -> bool:
    """Whether some lie in it directly."""
    return bool(_names(folder))


class PlainFolder(ImageSource):
    """The images that lie directly in a folder, sorted by name; all are of class 0.

    Raises:
        InputError: there are none.
    """

    class_names = None

    def __init__(self, root: Path) -> None:
        self.root, self._files = root, _names(root)
        if not self._files:
            raise InputError(f"{root}: found no image")
        self.class_ids = np.zeros(len(self._files), dtype=np.int32)

    def key(self, index: int) -> str:
        return self._files[index]

    def location(self, index: int) -> str:
        return printable(str(self.root / self.key(index)))

    def _read(self, index: int) -> bytes:
        return (self.root / self.key(index)).read_bytes()


def _names(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(name for name in names if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS)
