"""Reading JSON files that people may have touched."""

import json
from pathlib import Path
from typing import Any

from utils.errors import InputError


def read_json(path: Path) -> Any:
    """
    Raises:
        InputError: a file that is not there, cannot be read or holds something else.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: found no JSON: {error}") from error
