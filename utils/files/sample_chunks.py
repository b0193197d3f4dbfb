"""The images or codes of a sampling run in chunk files, from which a killed run resumes."""

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
    """Chunk files of images (n, H, W, 3) uint8 or codes (n, N); see `ChunkFiles`."""

    def __init__(self, folder: Path, num_images: int, chunk_size: int) -> None:
        super().__init__(folder, num_images, chunk_size, ".npy")

    def save(self, chunk: range, images: np.ndarray) -> None:
        """Write the images (len(chunk), H, W, 3) uint8 of a chunk, or its codes (len(chunk), N)."""
        assert len(images) == len(chunk), f"{len(images)} images for {chunk}"
        with self.writing(chunk) as partial_path, partial_path.open("wb") as file:
            np.save(file, images)

    def load(self) -> Iterator[np.ndarray]:
        """The images or codes of each chunk, in order."""
        return (np.load(self.path(chunk)) for chunk in self.chunks)

    def first_images(self, count: int) -> np.ndarray:
        """(count, H, W, 3) uint8, or fewer if there are fewer."""
        found: list[np.ndarray] = []
        num_found = 0
        for images in self.load():
            found.append(images[: count - num_found])
            num_found += len(found[-1])
            if num_found == count:
                break
        return np.concatenate(found)


class ChunkWriter:
    """Writes chunks in order, each after its PNG files, in threads."""

    def __init__(self, chunk_files: SampleChunks, png_folder: Path | None) -> None:
        """`png_folder`: for PNG files; None: write none."""
        self.chunk_files = chunk_files
        self.png_folder = png_folder
        self._queue = ThreadPoolExecutor(1)
        self._png_pool = ThreadPoolExecutor(PNG_THREADS)
        self._last: Future | None = None
        if png_folder is not None:
            png_folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.shutdown()
        self._png_pool.shutdown()
        if self._last is not None:
            self._last.result()

    def write(self, chunk: range, images: np.ndarray) -> None:
        """Queue a chunk; waits for the previous one, so memory holds one at most."""
        if self._last is not None:
            self._last.result()
        self._last = self._queue.submit(self._write, chunk, images)

    def _write(self, chunk: range, images: np.ndarray) -> None:
        if self.png_folder is not None:
            list(self._png_pool.map(partial(_write_png, self.png_folder), chunk, images))
        self.chunk_files.save(chunk, images)


def _write_png(folder: Path, index: int, image: np.ndarray) -> None:
    write_png(folder / f"{index:06d}.png", Image.fromarray(image))
