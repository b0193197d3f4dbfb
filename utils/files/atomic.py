"""Atomic writes: a file or folder gets its name only when it is complete, also after a power cut."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield `<path><suffix>` to write to; at the end it replaces `path`, after an error it is removed."""
    partial = path.with_name(path.name + suffix)
    try:
        with _errors_name(path):
            yield partial
            publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield the new folder `<path>.tmp` to fill, replacing one of a killed run; at the end it is renamed to `path`,
    which must not exist; after an error it is removed."""
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _errors_name(path):
            yield partial
            publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically. If several processes write it at the same time, the last one wins."""
    with atomic_file(path, f".{os.getpid()}.tmp") as partial:
        partial.write_text(text)


def publish(partial: Path, path: Path) -> None:
    """Flush a file, or a folder with all its files, to disk, rename it to `path` and flush the rename."""
    for inside in partial.rglob("*") if partial.is_dir() else []:
        sync(inside)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
