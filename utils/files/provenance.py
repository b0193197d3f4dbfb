"""What a result was made from, in a small JSON file beside it: one that was made otherwise is never replaced."""

import json
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.json_file import read_json


def is_made(result: Path, made_from: dict[str, Any], record: Path | None = None) -> bool:
    """Whether `result` is there, made from the same.

    Args:
        made_from: what must be equal, by name.
        record: the file that `write_record` wrote; None: `result` with the suffix .json.

    Raises:
        InputError: it is there and was made otherwise, or nothing tells from what.
    """
    if not result.exists():
        return False
    record = record or result.with_suffix(".json")
    found = read_json(record) if record.is_file() else None
    theirs = found.get("made_from") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(theirs, dict):
        reason = f"{record} does not tell from what"
    elif differing := [key for key in made_from if theirs.get(key) != made_from[key]]:
        reason = f"{differing[0]}={theirs.get(differing[0])} there, found {made_from[differing[0]]}"
    elif found.get("bytes", size := result.stat().st_size) != size:
        reason = f"{found['bytes']} bytes in {record}, found {size}"
    else:
        return True
    raise InputError(f"{result}: exists and was made otherwise ({reason}); delete it or choose another output")


def write_record(
    result: Path, made_from: dict[str, Any], record: Path | None = None, figures: dict[str, Any] | None = None
) -> None:
    """Of a result that is complete, with `bytes` among the figures; or, without, of one that is about to be made and
    may be made again: a kill on the way must not leave a result that nothing describes."""
    content = {**(figures or {}), "made_from": made_from}
    write_text(record or result.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
