"""The images or codes of a sampling run in part files, from which a killed run goes on."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files.chunk_files import ChunkFiles
from utils.images import write_png

PNG_THREADS = 4


class SampleChunks(ChunkFiles):
    """Part files that hold images, or their codes; see `ChunkFiles`.

    Args:
        folder: where they lie; `claim` creates it.
        num_images: of the whole run.
        block_size: images per part; the last part holds the rest.
    """

    def __init__(self, folder: Path, num_images: int, block_size: int) -> None:
        super().__init__(folder, num_images, block_size, ".npy")

    def save(self, block: range, images: np.ndarray) -> None:
        """Write the images (len(block), H, W, 3) uint8 of a block, or its codes (len(block), N) uint16."""
        assert len(images) == len(block), f"{len(images)} images for {block}"
        with self.writing(block) as partial, partial.open("wb") as file:
            np.save(file, images)

    def load(self) -> Iterator[np.ndarray]:
        """Everything in order, a part at a time."""
        return (np.load(self.path(block)) for block in self.blocks)

    def first_images(self, count: int) -> np.ndarray:
        """(count, H, W, 3) uint8, or fewer if there are not so many."""
        parts: list[np.ndarray] = []
        for images in self.load():
            parts.append(images[: count - sum(map(len, parts))])
            if sum(map(len, parts)) == count:
                break
        return np.concatenate(parts)


class ChunkWriter:
    """Writes parts, and PNG files before them, in worker threads beside the sampling; the parts appear in order."""

    def __init__(self, parts: SampleChunks, output: Path, save_png: bool) -> None:
        self.parts, self.folder = parts, output.with_name(output.name + ".images") if save_png else None
        self.queue, self.png_pool = ThreadPoolExecutor(1), ThreadPoolExecutor(PNG_THREADS)
        self.last: Future | None = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.queue.shutdown()
        self.png_pool.shutdown()
        if self.last is not None:
            self.last.result()

    def write(self, block: range, images: np.ndarray) -> None:
        """Queue a block; waits for the one before, so that not more than one is in memory."""
        if self.last is not None:
            self.last.result()
        self.last = self.queue.submit(self._write, block, images)

    def _write(self, block: range, images: np.ndarray) -> None:
        if self.folder is not None:
            list(self.png_pool.map(partial(_write_png, self.folder), block, images))
        self.parts.save(block, images)


def _write_png(folder: Path, index: int, image: np.ndarray) -> None:
    write_png(folder / f"{index:06d}.png", Image.fromarray(image))
