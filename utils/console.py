"""Standard output and error that never raise; escaping of text for a terminal and for Markdown."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Console:
    """A text stream that drops what it cannot write (closed pipe or terminal, full disk) and escapes characters that
    its encoding lacks."""

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


def printable_text(text: str) -> str:
    """Escapes control characters, such as line ends and terminal codes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def markdown_text(text: str) -> str:
    """One line that Markdown shows as it is, without links, HTML or cells of a table."""
    return re.sub(r"[\\<|]|\](?=\()", r"\\\g<0>", printable_text(text))


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    escaped = [[markdown_text(cell) for cell in cells] for cells in [head, ["---"] * len(head), *lines]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


@contextmanager
def unbreakable_console() -> Iterator[None]:
    """Inside `with`, neither print nor a progress bar raises if the console is closed or full.

    Numbers of standard streams that were closed at the start are reserved, or a file opened later would get one and
    receive the warnings of libraries that write to 2.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    stdout, stderr = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        sys.stdout = Console(stdout or devnull)
        sys.stderr = Console(stderr or devnull)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = stdout, stderr
            for stream in filter(None, (stdout, stderr)):
                _silence_if_broken(stream)


def _silence_if_broken(stream: TextIO) -> None:
    """Replace a broken stream: Python flushes at exit, where an error would become the exit status."""
    try:
        stream.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
