"""Writing files and folders atomically: they get their names only when they are complete, also after a power cut.

Everything is written with these functions, except files that grow (`tests/test_architecture.py` lists them). Errors
name the path. Mounts that cannot change permissions or flush a folder (CIFS, FUSE, NFS) are written to as well.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import errors_name

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # what link reports on such a mount
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP)  # what fsync reports on such a mount


@contextmanager
def atomic_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield `<path><suffix>` to write to; at the end it replaces `path`, after an error it is removed."""
    partial = path.with_name(path.name + suffix)
    try:
        with errors_name(path):
            yield partial
            publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield the new folder `<path>.tmp` to fill, replacing one of a killed run; at the end it is renamed to `path`;
    after an error it is removed.

    Args:
        replace: an older folder `path` is replaced; else `path` must not exist.
    """
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with errors_name(path):
            yield partial
            publish(partial, path, replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file in UTF-8, atomically. If several processes write it at the same time, the last one wins."""
    with atomic_file(path, f".{os.getpid()}.tmp") as partial:
        partial.write_text(text, encoding="utf-8")


def write_text_once(path: Path, text: str) -> None:
    """Like `write_text`, unless the file exists: of several processes that write it at the same time, the first one
    wins, or the last one on a mount without hard links."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with errors_name(path):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            try:
                os.link(partial, path)
            except FileExistsError:
                return
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, path: Path, replace: bool = False) -> None:
    """Flush a file, or a folder with all its files, to disk, rename it to `path` and flush the rename; `replace`: as
    for `atomic_folder`."""
    for inside in partial.rglob("*") if partial.is_dir() else []:
        sync(inside)
    sync(partial)
    older = path.with_name(path.name + ".deleted")  # a half-deleted folder must not have the final name
    if replace and path.is_dir():
        shutil.rmtree(older, ignore_errors=True)
        path.rename(older)
    partial.replace(path)
    sync(path.parent)
    if replace:
        shutil.rmtree(older, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to disk, if its mount can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with errors_name(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def set_permissions(path: Path) -> None:
    """Give a file the permissions of the umask, if its mount can; a failure is ignored."""
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):
        path.chmod(0o666 & ~umask)
