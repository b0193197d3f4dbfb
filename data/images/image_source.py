"""The interface of every source of images: random access by index."""

import errno
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.images.image_io import ImageDecoding
from utils.console import printable_text
from utils.errors import InputError

SYSTEM_FOLDERS = (
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "__MACOSX", "lost+found"),
    *("$RECYCLE.BIN", "System Volume Information"),
)


class ImageSource(ABC):
    """n images with class ids. `source[i]` is (PIL RGB image, class id). Sources can be pickled and forked.

    Attributes:
        class_ids: (n,) int32.
        class_names: in the order of the class ids; None if the files do not state them.
        decoding: how files become pixels.
    """

    class_ids: np.ndarray
    class_names: list[str] | None
    decoding: ImageDecoding = ImageDecoding()

    @abstractmethod
    def key(self, index: int) -> str:
        """Name of an image, unique within the source; bytes that are not UTF-8 are decoded with `surrogateescape`."""

    @abstractmethod
    def location(self, index: int) -> str:
        """File, and member if there is one, for error messages."""

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """The files that hold the images."""

    @abstractmethod
    def _read(self, index: int) -> bytes: ...

    @property
    def parts(self) -> list[int]:
        """Numbers of consecutive images that are stored together, such as those of each shard."""
        return [len(self)]

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image and its class id; raises InputError if it cannot be read or decoded."""
        return self.load(index), int(self.class_ids[index])

    def read(self, index: int) -> bytes:
        """The encoded image; raises InputError if the file cannot be read."""
        try:
            return self._read(index)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # not the fault of this image
                raise
            raise InputError(f"{self.location(index)}: cannot be read: {error.strerror or error}") from error

    def load(self, index: int) -> Image.Image:
        """An image; raises InputError if it cannot be read or decoded."""
        encoded = self.read(index)
        try:
            return self.decoding.decode(encoded)
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes raise many kinds of errors in Pillow
            if isinstance(error, Image.UnidentifiedImageError):
                problem = "no known format"
            else:
                problem = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{self.location(index)}: cannot decode the image of {len(encoded)} bytes: {problem}"
            ) from error

    @property
    def fingerprint(self) -> str:
        """Hash of the keys and class ids in their order; the pixels are not read."""
        return fingerprint_of_samples(self.class_ids, map(self.key, range(len(self))))

    @property
    def files_fingerprint(self) -> str:
        """Hash of the sizes and modification times of the files, which changes if an image is replaced under its name.
        Cheap, since no file is read."""
        digest = hashlib.sha256()
        for file in self.files():
            try:
                status = file.stat()
            except OSError:  # a broken link, which reading reports
                digest.update(b"unreadable\n")
            else:
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def has_stated_content(self) -> bool:
        """Whether the files state their sha256 and match it, which reads them all."""
        return False

    def check_class_ids(self, num_classes: int | None) -> None:
        """Raise InputError, with file and sample, for a class id that is not below the numbers of classes and names."""
        largest = int(self.class_ids.argmax())
        for limit, meaning in ((num_classes, "num_classes"), (len(self.class_names or []) or None, "class names")):
            if limit is not None and self.class_ids[largest] >= limit:
                raise InputError(
                    f"{self.location(largest)}: found class id {self.class_ids[largest]}, "
                    f"expected less than {limit} ({meaning})"
                )

    def name_classes(self, class_names: Sequence[str], origin: str) -> None:
        """Renumber the classes by their names' ids in `class_names`, which are from `origin`; no effect without names.

        Raises InputError for a name that `class_names` lacks or has twice.
        """
        if self.class_names is None or self.class_names == list(class_names):
            return
        new_ids = {name: class_id for class_id, name in enumerate(class_names)}
        used = [self.class_names[class_id] for class_id in np.unique(self.class_ids).tolist()]
        wrong = [name for name in used if class_names.count(name) != 1]
        if wrong:
            raise InputError(
                f"{self.location(0)}: found {len(wrong)} class names that {origin} lacks or has twice, such as "
                f"{wrong[0]!r}; expected names such as {class_names[0]!r}"
            )
        table = np.array([new_ids.get(name, -1) for name in self.class_names], dtype=np.int32)
        self.class_ids = table[self.class_ids]
        self.class_names = list(class_names)


def fingerprint_of_samples(class_ids: np.ndarray, keys: Iterable[str]) -> str:
    """Hash of class ids (n,) int32 and n keys."""
    digest = hashlib.sha256(class_ids.tobytes())
    for key in keys:
        digest.update(to_bytes(key) + b"\0")
    return digest.hexdigest()


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or a folder that a system or a NAS adds, which may hold thumbnails."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def to_bytes(name: str) -> bytes:
    """A file name as stored on disk."""
    return name.encode("utf-8", "surrogateescape")


def to_text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def from_disk(name: str) -> str:
    """A file name as the text of its bytes in UTF-8, for any encoding of the locale."""
    return to_text(os.fsencode(name))


def on_disk(name: str) -> str:
    """The file name whose text is `name`; the inverse of `from_disk`."""
    return os.fsdecode(to_bytes(name))


def printable(name: str) -> str:
    """Escapes bytes that are not UTF-8 (\\xNN) and control characters such as line ends."""
    return printable_text(to_bytes(name).decode("utf-8", "backslashreplace"))
