"""Standard output and error that may fail without harm: what a program makes is worth more than what it says.

And tables in Markdown, for it and for files.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Console:
    """A text stream that drops what it cannot write: a closed pipe or terminal, a full disk.

    Characters that its encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        with suppress(OSError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


@contextmanager
def lasting_console() -> Iterator[None]:
    """Inside `with` neither print nor a progress bar raises, whatever happened to the console.

    Of standard streams that were closed before the start the numbers are taken: a file that is opened later would get
    them, and with it the warnings of libraries that write to 2.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (Console(stream or nowhere) for stream in streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            for stream in filter(None, streams):
                _silence_if_broken(stream)


def _silence_if_broken(stream: TextIO) -> None:
    """Python flushes at the end, and what fails then becomes the exit status."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
