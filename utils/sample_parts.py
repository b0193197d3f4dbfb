"""The images of a sampling run in part files, from which a killed run goes on.

A part is a block of consecutive image indices. The blocks depend on the number of images and the block size only, so
any number of processes can share the missing ones. `fingerprint.json` beside the parts tells what they were made from.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import InputError
from utils.files import complete_file

POLL_SECONDS = 0.5
FINGERPRINT = "fingerprint.json"


class SampleParts:
    """Args:
    folder: created by `claim`.
    num_images: of the whole run.
    block_size: images per part; the last part holds the rest.
    """

    def __init__(self, folder: Path, num_images: int, block_size: int) -> None:
        self.folder = folder
        self.blocks = [range(i, min(i + block_size, num_images)) for i in range(0, num_images, block_size)]

    def claim(self, fingerprint: dict[str, Any]) -> None:
        """Create the folder for parts of this fingerprint (flat, by config key), unless that has been done.

        Raises:
            InputError: parts that nothing describes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FINGERPRINT
        if path.exists():
            return
        if next(self.folder.glob("*.npy"), None):
            raise InputError(f"{self.folder}: holds parts but no {FINGERPRINT}; delete the folder to start anew")
        with complete_file(path) as partial:
            partial.write_text(json.dumps(fingerprint, indent=1) + "\n")

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Refuse to mix images of different origin.

        Raises:
            InputError: the folder was claimed with another fingerprint; the first key that differs is named.
        """
        path = self.folder / FINGERPRINT
        theirs = json.loads(path.read_text())
        for key in [*fingerprint, *theirs]:
            if fingerprint.get(key) != theirs.get(key):
                raise InputError(
                    f"{path}: {key}={theirs.get(key)} in the run that began here, found {fingerprint.get(key)}; "
                    "finish that run first or delete the folder"
                )

    def path(self, block: range) -> Path:
        return self.folder / f"{block.start:09d}.npy"

    def missing(self) -> list[range]:
        return [block for block in self.blocks if not self.path(block).exists()]

    def save(self, block: range, images: np.ndarray) -> None:
        """Write the images (len(block), H, W, 3) uint8 of a block."""
        assert len(images) == len(block), f"{len(images)} images for {block}"
        with complete_file(self.path(block)) as partial, partial.open("wb") as file:
            np.save(file, images)

    def wait(self) -> None:
        """Return when all parts are there; the launcher ends this process if another one dies."""
        while self.missing():
            time.sleep(POLL_SECONDS)

    def load(self) -> Iterator[np.ndarray]:
        """All images in order, a part at a time."""
        return (np.load(self.path(block)) for block in self.blocks)

    def first_images(self, count: int) -> np.ndarray:
        """(count, H, W, 3) uint8, or fewer if there are not so many."""
        parts = []
        for images in self.load():
            parts.append(images[: count - sum(map(len, parts))])
            if sum(map(len, parts)) == count:
                break
        return np.concatenate(parts)
