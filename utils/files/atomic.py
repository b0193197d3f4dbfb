"""Files and folders that exist under their name only when they are complete, also after a power cut."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Give `<path><suffix>` to write to; at the end it takes the place of `path`, after an error it is removed."""
    partial = path.with_name(path.name + suffix)
    try:
        with naming(path):
            yield partial
            publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give the new folder `<path>.tmp` to fill, in place of one that a killed run left; at the end it becomes `path`,
    which must not exist then; after an error it is removed."""
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with naming(path):
            yield partial
            publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside that does not tell the file, as of a full disk, tells `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Of a small file: several processes may write it at the same time, and the last one stays."""
    with atomic_file(path, f".{os.getpid()}.tmp") as partial:
        partial.write_text(text)


def publish(partial: Path, path: Path) -> None:
    """Flush a file, or a folder and all in it, to disk and rename it to `path`; then the name, too, is on disk."""
    for inside in partial.rglob("*") if partial.is_dir() else []:
        sync(inside)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
