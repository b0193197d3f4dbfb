"""Reading JSON files that people may have edited."""

import json
from pathlib import Path
from typing import Any

from utils.errors import InputError


def read_json(path: Path) -> Any:
    """Raises InputError for a file that is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no JSON: {error}") from error
