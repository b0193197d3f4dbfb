"""Images in a folder: one sub-folder per class, the layout of torchvision's ImageFolder, or none and no classes."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.images.image_io import has_image_name
from data.images.image_source import ImageSource, from_disk, is_ignored, on_disk, printable, to_bytes, to_text
from data.images.notices import SkippedFiles
from utils.errors import InputError
from utils.files.text import same_letters

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


class _Files(ImageSource):
    """Files of the folder `root`; `key` is the path in it."""

    root: Path

    def location(self, index: int) -> str:
        return printable(str(self.root / self.key(index)))

    def files(self) -> Iterator[Path]:
        return (self.root / on_disk(self.key(index)) for index in range(len(self)))

    def _read(self, index: int) -> bytes:
        return (self.root / on_disk(self.key(index))).read_bytes()


class ImageFolder(_Files):
    """Images of a folder with one sub-folder per class, in which folders may be nested.

    Class names are the names of the sub-folders, sorted as numbers if all are numbers, else as text. Hidden names and
    folders of a system or a NAS (`is_ignored`) do not count. Other files, and images next to the class folders, are
    skipped with a notice.

    Raises InputError if there is no sub-folder, one without images, or one that is no class: a split by its name, or
    with images only two or more folders below (with one sub-folder: one or more).
    """

    class_names: list[str]

    def __init__(self, root: Path) -> None:
        self.root = root
        skipped = SkippedFiles()
        self._folders = class_folders(root, skipped)
        files = [_image_paths(root, folder, skipped) for folder in self._folders]
        for folder, paths in zip(self._folders, files, strict=True):
            _check_depth(root / folder, paths, limit=0 if len(files) == 1 else 1)
        skipped.notify(str(root))
        self.class_names = [class_name(folder) for folder in self._folders]
        self._folder_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(paths) for paths in files])
        self.class_ids = self._folder_of  # `name_classes` may replace it
        self._paths = np.array([to_bytes(path) for paths in files for path in paths])

    def key(self, index: int) -> str:
        return f"{self._folders[self._folder_of[index]]}/{to_text(self._paths[index])}"


class PlainFolder(_Files):
    """The images directly in a folder, at least one, sorted by name, all of class 0."""

    class_names = None

    def __init__(self, root: Path) -> None:
        self.root = root
        names = [from_disk(path.name) for path in root.iterdir() if not is_ignored(path.name)]
        self._names = sorted(name for name in names if has_image_name(name))
        if not self._names:
            raise InputError(f"{root}: found no image")
        self.class_ids = np.zeros(len(self._names), dtype=np.int32)

    def key(self, index: int) -> str:
        return self._names[index]


def is_plain(folder: Path) -> bool:
    """A folder without sub-folders."""
    return folder.is_dir() and not any(path.is_dir() and not is_ignored(path.name) for path in folder.iterdir())


def class_folders(root: Path, skipped: SkippedFiles | None = None) -> list[str]:
    """Names of the sub-folders in the order of the class ids; files next to them go to `skipped`."""
    with os.scandir(root) as scan:
        entries = [entry for entry in scan if not is_ignored(entry.name)]
    names = sorted(from_disk(entry.name) for entry in entries if entry.is_dir())
    if not names:
        hint = f"; for shards give {root / '*.tar'}" if next(root.glob("*.tar"), None) else ""
        raise InputError(f"{root}: found no sub-folder, expected one per class{hint}")
    splits = [name for name in names if name.lower() in SPLITS]
    if len(splits) > 1 or splits == names:
        raise InputError(
            f"{root}: found the folders {', '.join(splits)}, which are splits, expected one folder per class; give "
            f"{root / splits[0]}"
        )
    if all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=int)
    for entry in entries:
        if skipped is not None and not entry.is_dir():
            skipped.add(from_disk(entry.name), "next to the class folders")
    return names


def class_name(folder: str) -> str:
    """The name of the class of a folder; in NFC, so that copies of a data set on macOS and Linux have equal names."""
    return same_letters(printable(folder))


def _image_paths(root: Path, folder: str, skipped: SkippedFiles) -> list[str]:
    """Paths of the images in a class folder, relative to it, sorted."""
    paths = []
    for path in _files(root / on_disk(folder), "", (_identity(root),)):
        if has_image_name(path):
            paths.append(path)
        else:
            skipped.add(f"{folder}/{path}", "no image")
    if not paths:
        raise InputError(f"{printable(str(root / folder))}: found no image, expected some: every sub-folder is a class")
    return sorted(paths)


def _check_depth(folder: Path, paths: list[str], limit: int) -> None:
    """Raise InputError if all images of a class are more than `limit` folders below its own: the folders in between are
    more likely the classes."""
    nearest = min(paths, key=lambda path: path.count("/"))
    if nearest.count("/") > limit:
        raise InputError(
            f"{printable(str(folder))}: found no image nearer than {printable(nearest)}, expected at most {limit} "
            "folders between a class and its images; give the folder whose sub-folders are the classes"
        )


def _files(folder: Path, prefix: str, parents: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths of all files. A folder or broken link with the name of an image counts as one: reading it is an error."""
    identity = _identity(folder)
    if identity in parents:  # a link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_ignored(entry.name):
                continue
            if entry.is_dir() and not has_image_name(entry.name):
                yield from _files(folder / entry.name, f"{prefix}{from_disk(entry.name)}/", (*parents, identity))
            else:
                yield prefix + from_disk(entry.name)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
