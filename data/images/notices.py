"""Notices about skipped files and unusual images: counted, one line per kind, with an example."""

import os
import sys
from collections import Counter

from torch import Tensor

from data.images.image_io import ISSUE_TEXT, ImageIssue
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


class IssueCounter:
    """Counts the issues of the images that one process has read; prints a notice when a kind first appears.

    Args:
        max_bad_fraction: allowed share of unreadable images in the source.

    Attributes:
        num_skipped: how often an unreadable image was skipped.
    """

    def __init__(self, source: ImageSource, max_bad_fraction: float = 0.0) -> None:
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.num_skipped = 0
        self._indices: dict[ImageIssue, set[int]] = {}

    def add(self, indices: Tensor, issues: Tensor) -> None:
        """A batch: indices (B,) and issues (B,), both int64.

        Raises:
            InputError: more images are unreadable than `max_bad_fraction` allows.
        """
        for index, bits in zip(indices.tolist(), issues.tolist(), strict=True):
            if bits:
                self.add_image(index, ImageIssue(bits))

    def add_image(self, index: int, issues: ImageIssue) -> None:
        """As `add`, for one image."""
        for issue in ImageIssue:
            if not issue & issues:
                continue
            indices = self._indices.setdefault(issue, set())
            is_unreadable = issue == ImageIssue.UNREADABLE
            if index not in indices and (is_unreadable or not indices):
                notify(f"{self.source.location(index)}: {ISSUE_TEXT[issue]}")
            indices.add(index)
            if is_unreadable:
                self.num_skipped += 1
                check_unreadable(self.source, indices, self.max_bad_fraction)

    def summary(self) -> None:
        """Print how many images have each issue."""
        for issue, indices in self._indices.items():
            notify(f"{len(indices)} of {len(self.source)} images: {ISSUE_TEXT[issue]}")


def check_unreadable(source: ImageSource, indices: set[int], max_bad_fraction: float) -> None:
    """
    Raises:
        InputError: more than `max_bad_fraction` of the images of the source are unreadable.
    """
    if len(indices) > max_bad_fraction * len(source):
        raise InputError(
            f"{len(indices)} of {len(source)} images cannot be decoded, expected at most "
            f"dataset.params.max_bad_fraction={max_bad_fraction}: {source.location(min(indices))}"
        )
