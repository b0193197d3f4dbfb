"""Images that lie in a folder without classes."""

from pathlib import Path

import numpy as np

from data.images.image_io import has_image_name
from data.images.image_source import ImageSource, printable
from utils.errors import InputError


def is_plain(folder: Path) -> bool:
    """A folder that has none within, for classes."""
    return folder.is_dir() and not any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


class PlainFolder(ImageSource):
    """The images that lie directly in a folder, sorted by name; all are of class 0.

    Raises:
        InputError: there are none.
    """

    class_names = None

    def __init__(self, root: Path) -> None:
        names = (path.name for path in root.iterdir() if not path.name.startswith("."))
        self.root = root
        self._files = sorted(name for name in names if has_image_name(name))
        if not self._files:
            raise InputError(f"{root}: found no image")
        self.class_ids = np.zeros(len(self._files), dtype=np.int32)

    def key(self, index: int) -> str:
        return self._files[index]

    def location(self, index: int) -> str:
        return printable(str(self.root / self.key(index)))

    def _read(self, index: int) -> bytes:
        return (self.root / self.key(index)).read_bytes()
