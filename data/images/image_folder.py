"""Images in a folder with one sub-folder per class, the layout of torchvision's ImageFolder."""

from pathlib import Path

import numpy as np

from data.images.image_source import IMAGE_EXTENSIONS, ImageSource
from utils.errors import InputError


class ImageFolder(ImageSource):
    """The sorted sub-folders are the classes 0, 1, ..., their names the class names; names with a dot first are left.

    Raises:
        InputError: no sub-folders, or one without images.
    """

    class_names: list[str]

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            hint = f"; for shards give {root / '*.tar'}" if next(root.glob("*.tar"), None) else ""
            raise InputError(f"{root}: found no sub-folder, expected one per class{hint}")
        files = [_image_names(folder) for folder in folders]
        self.class_names = [folder.name for folder in folders]
        self.class_ids = np.repeat(np.arange(len(folders), dtype=np.int32), [len(names) for names in files])
        self._names = np.array([name.encode() for names in files for name in names])

    def key(self, index: int) -> str:
        return f"{self.class_names[self.class_ids[index]]}/{self._names[index].decode()}"

    def location(self, index: int) -> str:
        return str(self.root / self.key(index))

    def read(self, index: int) -> bytes:
        return (self.root / self.key(index)).read_bytes()


def _image_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
    if not names:
        raise InputError(f"{folder}: found no image, expected some: every sub-folder is a class")
    return names
