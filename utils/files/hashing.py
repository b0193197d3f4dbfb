"""sha256 of files and of values."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.errors import errors_name

CHUNK_BYTES = 1 << 20


def file_sha256(path: Path, progress: bool = False) -> str:
    """sha256 of the content, in hexadecimal; `progress` shows a bar after a second."""
    return range_sha256(path, 0, path.stat().st_size, progress)


def range_sha256(path: Path, start: int, stop: int, progress: bool = False) -> str:
    """sha256 of the bytes `start` to `stop - 1` of a file; `progress` shows a bar after a second."""
    digest = hashlib.sha256()
    bar = tqdm(total=stop - start, unit="B", unit_scale=True, desc=f"sha256 {path.name}", delay=1, disable=not progress)
    with errors_name(path), path.open("rb") as file, bar:
        file.seek(start)
        while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
            digest.update(chunk)
            start += len(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def hash_of(values: dict[str, Any]) -> str:
    """sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
