"""Long work on many items, saved in chunk files, from which a killed run resumes.

A chunk is a range of consecutive items, processed by one process, whose file is written atomically. Chunks depend only
on the number of items and the chunk size, so any number of processes can share the missing ones.

Not joblib, dask or luigi, which start the processes themselves: here torchrun or a fork does, and the files alone
record finished work.
"""

import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import InputError
from utils.faults import fault_point
from utils.files.atomic import atomic_file
from utils.files.json_file import read_json
from utils.files.provenance import is_made, provenance_in, write_record

if TYPE_CHECKING:  # torch is slow to import, and conversions do without
    from utils.distributed import DistributedContext

POLL_S = 0.5
PROVENANCE_FILE = "provenance.json"


class ChunkFiles:
    """The chunk files of work on items 0 to num_items - 1.

    Args:
        folder: folder of the chunk files; `open` creates it.
        chunk_size: items per chunk; the last chunk holds the rest.
        suffix: suffix of the chunk files, such as .npy.
        parts: numbers of consecutive items, num_items in all, across whose borders no chunk reaches.

    Attributes:
        chunks: the range of items of each chunk, in order.
    """

    def __init__(
        self, folder: Path, num_items: int, chunk_size: int, suffix: str, parts: Sequence[int] | None = None
    ) -> None:
        self.folder = folder
        self.suffix = suffix
        ends = list(accumulate(parts or [num_items]))
        self.chunks = [
            range(i, min(i + chunk_size, end))
            for start, end in zip([0, *ends], ends, strict=False)
            for i in range(start, end, chunk_size)
        ]
        self._record = folder / PROVENANCE_FILE

    @property
    def can_resume(self) -> bool:
        """Whether there may be chunks of an earlier run; not while or after they are removed."""
        return self._record.exists()

    def recorded(self, key: str) -> Any:
        """The value of `key` in the provenance of the chunks of an earlier run; None without them."""
        return (provenance_in(read_json(self._record)) or {}).get(key) if self.can_resume else None

    def open(self, provenance: dict[str, Any]) -> None:
        """Create the folder, or resume from the chunks of an earlier run; raises InputError if these have another
        provenance, or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.can_resume:
            is_made(self.folder, provenance, self._record, remedy="finish that run first or delete the folder")
            self._delete_damaged()
        elif next(self.folder.glob(f"*{self.suffix}"), None):
            raise InputError(f"{self.folder}: found chunks but no {PROVENANCE_FILE}; delete the folder to start again")
        else:
            write_record(self.folder, provenance, self._record)

    def open_or_replace(self, provenance: dict[str, Any]) -> None:
        """Like `open`, but chunks of another provenance are deleted."""
        try:
            self.open(provenance)
        except InputError:
            self.remove()
            self.open(provenance)

    def open_on_all_ranks(self, provenance: dict[str, Any], ctx: "DistributedContext") -> list[range]:
        """Like `open`, for all ranks together; returns the missing chunks."""
        ctx.rank0_first(self.open, provenance)
        missing = self.missing()
        ctx.barrier()  # no rank adds chunks before all ranks have listed them
        return missing

    def path(self, chunk: range) -> Path:
        return self.folder / f"{chunk.start:012d}{self.suffix}"

    def missing(self) -> list[range]:
        names = {entry.name for entry in os.scandir(self.folder)}
        return [chunk for chunk in self.chunks if self.path(chunk).name not in names]

    def _delete_damaged(self) -> None:
        """Delete chunks that were damaged since they were written, which are then missing."""
        for chunk in self.chunks:
            path = self.path(chunk)
            if path.exists() and not is_readable(path):
                print(f"{path}: damaged; it is made again")
                path.unlink()

    @contextmanager
    def writing(self, chunk: range) -> Iterator[Path]:
        """Yield a path to write a chunk to, renamed at the end. Two processes may write the same chunk."""
        number = self.chunks.index(chunk)
        with atomic_file(self.path(chunk), f".{os.getpid()}.tmp") as partial:
            fault_point("chunk.begin", number)
            yield partial
            fault_point("chunk.rename", number)

    def wait(self) -> None:
        """Return when no chunk is missing; the launcher ends this process if another one dies."""
        while self.missing():
            time.sleep(POLL_S)

    def remove(self) -> None:
        """Delete all chunks, the provenance first, so that no later run resumes from partly deleted chunks."""
        self._record.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)


def is_readable(path: Path) -> bool:
    """Whether a chunk file is complete: its length (.npy), its checksums (.npz) or its syntax (.json)."""
    try:
        if path.suffix == ".npy":
            np.load(path, mmap_mode="r")
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
    return True
