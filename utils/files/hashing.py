"""sha256 of files and of values."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

CHUNK_BYTES = 1 << 20


def file_sha256(path: Path, progress: bool = False) -> str:
    """sha256 of the content, in hexadecimal; `progress` shows a bar after a second."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"sha256 {path.name}", delay=1, disable=not progress)
    with path.open("rb") as file, bar:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def range_sha256(path: Path, start: int, stop: int) -> str:
    """sha256 of the bytes `start` to `stop - 1` of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
            digest.update(chunk)
            start += len(chunk)
    return digest.hexdigest()


def hash_of(values: dict[str, Any]) -> str:
    """sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
