"""The images of a sampling run in part files, from which a killed run goes on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.files.parts import Parts


class SampleParts(Parts):
    """Part files that hold images; see `Parts`.

    Args:
        folder: where they lie; `claim` creates it.
        num_images: of the whole run.
        block_size: images per part; the last part holds the rest.
    """

    def __init__(self, folder: Path, num_images: int, block_size: int) -> None:
        super().__init__(folder, num_images, block_size, ".npy")

    def save(self, block: range, images: np.ndarray) -> None:
        """Write the images (len(block), H, W, 3) uint8 of a block."""
        assert len(images) == len(block), f"{len(images)} images for {block}"
        with self.writing(block) as partial, partial.open("wb") as file:
            np.save(file, images)

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
