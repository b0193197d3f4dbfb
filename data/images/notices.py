"""What a user is told about images that were left out or changed: counted, with one example by name, in one line."""

import os
import sys
from collections import Counter

from PIL import Image
from torch import Tensor

from data.images.image_io import MEANINGS, Note
from data.images.image_source import ImageSource, printable
from utils.errors import InputError


def notify(text: str) -> None:
    """One line on stderr; of several ranks, the first alone speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"notice: {text}", file=sys.stderr, flush=True)


class LeftOut:
    """Files that are no part of a source, counted by reason and extension."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}

    def add(self, name: str, reason: str) -> None:
        base = name.rpartition("/")[2]
        kind = (base.rpartition(".")[2] if "." in base else "without extension", reason)
        self.counts[kind] += 1
        self.examples.setdefault(kind, name)

    def notify(self, where: str) -> None:
        if not self.counts:
            return
        kinds = [
            f"{count} {extension} ({reason}, such as {printable(self.examples[extension, reason])})"
            for (extension, reason), count in self.counts.most_common()
        ]
        notify(f"{where}: left out {self.counts.total()} files: {', '.join(kinds)}")


class ImageNotes:
    """Counts the notes of the images that one process has read, and says each kind when it first appears.

    Args:
        max_bad_fraction: of the images of the source that may be unreadable.

    Attributes:
        num_skipped: visits of images that could not be decoded.
    """

    def __init__(self, source: ImageSource, max_bad_fraction: float = 0.0) -> None:
        self.source, self.max_bad_fraction = source, max_bad_fraction
        self.num_skipped, self._seen = 0, dict[Note, set[int]]()

    def add(self, indices: Tensor, notes: Tensor) -> None:
        """Of a batch: indices (B,) and notes (B,), both int64.

        Raises:
            InputError: more different images than `max_bad_fraction` allows cannot be decoded.
        """
        for index, note in zip(indices[notes != 0].tolist(), notes[notes != 0].tolist(), strict=True):
            self.add_one(index, Note(note))

    def add_one(self, index: int, note: Note) -> None:
        for kind in Note:
            if kind & note:
                self._add(index, kind)

    def _add(self, index: int, kind: Note) -> None:
        seen = self._seen.setdefault(kind, set())
        self.num_skipped += kind == Note.UNREADABLE
        if index in seen:
            return
        if not seen or kind == Note.UNREADABLE:
            notify(f"{self.source.location(index)}: {MEANINGS[kind]}")
        seen.add(index)
        if kind == Note.UNREADABLE:
            check_bad(self.source, seen, self.max_bad_fraction)

    def summary(self) -> None:
        """Say how many images of each kind this process has read."""
        for kind, seen in self._seen.items():
            notify(f"{len(seen)} of {len(self.source)} images: {MEANINGS[kind]}")


def check_bad(source: ImageSource, bad: set[int], max_bad_fraction: float) -> None:
    """
    Raises:
        InputError: too many images cannot be decoded.
    """
    if len(bad) > max_bad_fraction * len(source):
        raise InputError(
            f"{len(bad)} of {len(source)} images cannot be decoded, expected at most "
            f"dataset.params.max_bad_fraction={max_bad_fraction}: {source.location(min(bad))}"
        )


class CountedImages:
    """A source for readers who want nothing but `source[i]`: what is done to the images is counted and told."""

    def __init__(self, source: ImageSource) -> None:
        self.source, self.notes = source, ImageNotes(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, note = self.source.load(index)
        self.notes.add_one(index, note)
        return image, int(self.source.class_ids[index])
