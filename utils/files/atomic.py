"""Files that exist under their name only when they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Give `<path><suffix>` to write to; at the end it is flushed to disk and renamed to `path`, else removed."""
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
