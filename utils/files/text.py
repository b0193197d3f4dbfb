"""Text files that people may have written with any editor, and names of files."""

import os
import unicodedata
from pathlib import Path

from utils.errors import InputError


def read_text(path: Path) -> str:
    """The text in UTF-8, with or without a byte order mark; raises InputError if the file is missing or has another
    encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at byte {error.start}; save it as UTF-8") from error


def same_letters(name: str) -> str:
    """The name in Unicode's form NFC: macOS stores accents separately, so names that look equal may differ."""
    return unicodedata.normalize("NFC", name)


def user_path(text: str) -> Path:
    """A path of a command line: `~` is the home folder, also where the shell leaves it, as in `--option=~/file`."""
    return Path(os.path.expanduser(text))
