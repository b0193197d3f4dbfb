"""Images in a folder with one sub-folder per class, the layout of torchvision's ImageFolder."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.images.image_io import has_image_name
from data.images.image_source import ImageSource, printable, to_bytes, to_text
from data.images.notices import LeftOut, notify
from utils.errors import InputError


class ImageFolder(ImageSource):
    """The sub-folders are the classes 0, 1, ..., with their names as class names: sorted as text, or as numbers if all
    are numbers. The images of a class may lie in folders within. Names with a dot first are no part of it; files that
    are no images and images outside of the sub-folders are left out, with a notice that counts them.

    Raises:
        InputError: no sub-folders, or one without images.
    """

    class_names: list[str]

    def __init__(self, root: Path) -> None:
        self.root, left_out = root, LeftOut()
        self._folders = class_folders(root, left_out)
        files = [_image_names(root, folder, left_out) for folder in self._folders]
        left_out.notify(str(root))
        self.class_names = list(map(printable, self._folders))
        self._folder_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files])
        self.class_ids = self._folder_of  # until `name_classes`
        self._names = np.array([to_bytes(name) for names in files for name in names])

    def key(self, index: int) -> str:
        return f"{self._folders[self._folder_of[index]]}/{to_text(self._names[index])}"

    def location(self, index: int) -> str:
        return printable(str(self.root / self.key(index)))

    def _read(self, index: int) -> bytes:
        return (self.root / self.key(index)).read_bytes()


def class_folders(root: Path, left_out: LeftOut | None = None) -> list[str]:
    """Names of the sub-folders in the order of the class ids.

    Raises:
        InputError: there are none.
    """
    with os.scandir(root) as scan:
        entries = [entry for entry in scan if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        hint = f"; for shards give {root / '*.tar'}" if next(root.glob("*.tar"), None) else ""
        raise InputError(f"{root}: found no sub-folder, expected one per class{hint}")
    if left_out is not None:
        for entry in entries:
            if not entry.is_dir():
                left_out.add(entry.name, "beside the class folders")
    numbers = [name for name in names if name.isascii() and name.isdigit()]
    if len(numbers) == len(names):
        return sorted(names, key=int)
    if left_out is not None and numbers != sorted(numbers, key=int):
        notify(f"{root}: the classes are in the order of text, for not all are numbers: {', '.join(numbers[:4])}, ...")
    return names


def _image_names(root: Path, folder: str, left_out: LeftOut) -> list[str]:
    """Paths of the images in a class folder, relative to it, sorted."""
    names = []
    for path, is_image in _files(root / folder, "", (_identity(root),)):
        if is_image:
            names.append(path)
        else:
            left_out.add(f"{folder}/{path}", "no image")
    if not names:
        raise InputError(f"{printable(str(root / folder))}: found no image, expected some: every sub-folder is a class")
    return sorted(names)


def _files(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, bool]]:
    """Paths of all files and whether their names are those of images. What is called like an image but is a folder or
    a link to nowhere counts as an image: reading it is an error, as for any image that cannot be read."""
    identity = _identity(folder)
    if identity in above:  # a link to a folder around it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_image = has_image_name(entry.name)
            if entry.is_dir() and not is_image:
                yield from _files(folder / entry.name, f"{prefix}{entry.name}/", (*above, identity))
            else:
                yield prefix + entry.name, is_image


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
