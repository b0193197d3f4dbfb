"""Long work on many items, kept in part files, from which a killed run goes on.

A part is the file of one finished block, which is a range of consecutive items. The blocks depend on the number of
items and the block size only, so any number of processes can share the missing ones. `fingerprint.json` beside the
parts tells what they were made from.

Our own, for libraries that do such work (joblib, dask, luigi) bring a scheduler and choose the processes themselves;
here they are torchrun's, or forked, and the files alone say what is done.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.faults import fault_point
from utils.files.atomic import atomic_file, write_text
from utils.files.json_file import read_json

POLL_SECONDS = 0.5
FINGERPRINT = "fingerprint.json"


class ChunkFiles:
    """The part files of some work on items 0 to count - 1.

    Args:
        folder: where they lie; `claim` creates it.
        count: items of the whole work.
        block_size: items per part; the last part holds the rest.
        suffix: of the part files, such as .npy.

    Attributes:
        blocks: the range of items of each part, in order.
    """

    def __init__(self, folder: Path, count: int, block_size: int, suffix: str) -> None:
        self.folder, self.suffix = folder, suffix
        self.blocks = [range(i, min(i + block_size, count)) for i in range(0, count, block_size)]

    def claim(self, fingerprint: dict[str, Any]) -> None:
        """Create the folder for parts of this fingerprint (flat, by config key), unless that has been done.

        Raises:
            InputError: parts of another fingerprint, or that nothing describes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.claimed:
            self.check(fingerprint)
            return
        if next(self.folder.glob(f"*{self.suffix}"), None):
            raise InputError(f"{self.folder}: holds parts but no {FINGERPRINT}; delete the folder to start anew")
        write_text(self.folder / FINGERPRINT, json.dumps(fingerprint, indent=1) + "\n")

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Refuse to mix parts of different origin.

        Raises:
            InputError: the folder was claimed with another fingerprint; the first key that differs is named.
        """
        path = self.folder / FINGERPRINT
        theirs = read_json(path)
        if not isinstance(theirs, dict):
            raise InputError(f"{path}: damaged; delete the folder to start anew")
        for key in [*fingerprint, *theirs]:
            if fingerprint.get(key) != theirs.get(key):
                raise InputError(
                    f"{path}: {key}={theirs.get(key)} in the run that began here, found {fingerprint.get(key)}; "
                    "finish that run first or delete the folder"
                )

    @property
    def claimed(self) -> bool:
        """Whether there may be parts to go on from; not so while, or after, they are deleted."""
        return (self.folder / FINGERPRINT).exists()

    def begin(self, fingerprint: dict[str, Any], ctx: DistributedContext) -> list[range]:
        """`claim` for all processes of a launch, which call this together; the parts missing at that moment.

        Raises:
            InputError: parts of another fingerprint, or that nothing describes.
        """
        ctx.rank0_first(lambda: self.claim(fingerprint))
        missing = self.missing()
        ctx.barrier()  # all have looked before anyone adds parts
        return missing

    def claim_anew(self, fingerprint: dict[str, Any]) -> None:
        """As `claim`, but parts of another fingerprint, which are of no use any more, are deleted."""
        try:
            self.claim(fingerprint)
        except InputError:
            self.remove()
            self.claim(fingerprint)

    def path(self, block: range) -> Path:
        return self.folder / f"{block.start:012d}{self.suffix}"

    def missing(self) -> list[range]:
        there = {entry.name for entry in os.scandir(self.folder)}
        return [block for block in self.blocks if self.path(block).name not in there]

    @contextmanager
    def writing(self, block: range) -> Iterator[Path]:
        """Give a path to write a part to; it gets its name at the end. Two processes at the same part do no harm."""
        number = block.start // len(self.blocks[0])
        with atomic_file(self.path(block), f".{os.getpid()}.tmp") as partial:
            fault_point("part.begin", number)
            yield partial
            fault_point("part.rename", number)

    def wait(self) -> None:
        """Return when all parts are there; the launcher ends this process if another one dies."""
        while self.missing():
            time.sleep(POLL_SECONDS)

    def remove(self) -> None:
        """Delete all parts, if there are any. The fingerprint goes first: what a killed deletion leaves is of no use to
        anyone."""
        (self.folder / FINGERPRINT).unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)
