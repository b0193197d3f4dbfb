"""Notices about skipped files and images."""

import os
import sys
from collections import Counter

from torch import Tensor

from data.images.image_source import ImageSource, printable
from utils.errors import InputError


def notify(text: str) -> None:
    """One line on stderr, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"notice: {text}", file=sys.stderr, flush=True)


class SkippedFiles:
    """Files that are not part of a source, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        self._counts[reason] += 1
        self._examples.setdefault(reason, name)

    def notify(self, where: str) -> None:
        for reason, count in self._counts.items():
            notify(f"{where}: skipped {count} files ({reason}), such as {printable(self._examples[reason])}")


class SkippedImages:
    """Counts the unreadable images that one process has skipped; a notice names each.

    Args:
        max_bad_fraction: allowed share of unreadable images in the source.

    Attributes:
        count: how often one was skipped; more than their number in later passes.
    """

    def __init__(self, source: ImageSource, max_bad_fraction: float = 0.0) -> None:
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.count = 0
        self._indices: set[int] = set()

    def add(self, indices: Tensor, skipped: Tensor) -> None:
        """Add a batch, indices (B,) int64 and skipped (B,) bool; raises InputError for too many unreadable images."""
        for index in indices[skipped].tolist():
            self.count += 1
            if index not in self._indices:
                notify(f"{self.source.location(index)}: cannot be decoded: skipped (dataset.params.on_bad_sample)")
                self._indices.add(index)
        check_unreadable(self.source, self._indices, self.max_bad_fraction)


def check_unreadable(source: ImageSource, indices: set[int], max_bad_fraction: float) -> None:
    if len(indices) > max_bad_fraction * len(source):
        raise InputError(
            f"{len(indices)} of {len(source)} images cannot be decoded, expected at most "
            f"dataset.params.max_bad_fraction={max_bad_fraction}: {source.location(min(indices))}"
        )
