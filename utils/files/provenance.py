"""The provenance of a result: everything that it depends on, by name, in one JSON form.

    {"provenance": {"sampling.seed": 42, ...}, other facts, such as metrics}

A JSON file of this form is next to each result and in each folder of chunk files. A result of another provenance is
never replaced.
"""

import json
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.json_file import read_json

KEY, OLDER_KEY = "provenance", "made_from"


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """`key: found X, expected Y` for each key whose values differ; an absent key equals None."""
    return [
        f"{key}: found {found.get(key)}, expected {expected.get(key)}"
        for key in dict.fromkeys([*expected, *found])
        if found.get(key) != expected.get(key)
    ]


def provenance_in(content: Any) -> dict[str, Any] | None:
    """The provenance in the content of a JSON file; None if absent."""
    if not isinstance(content, dict):
        return None
    provenance = content.get(KEY, content.get(OLDER_KEY))
    return provenance if isinstance(provenance, dict) else None


def is_made(
    result: Path,
    provenance: dict[str, Any],
    record: Path | None = None,
    remedy: str = "delete it or choose another output",
) -> bool:
    """Whether `result` exists with this provenance; raises InputError if it has another one, or none.

    Args:
        record: file of `write_record`; None: `result` with the suffix .json.
        remedy: the end of the error message.
    """
    if not result.exists():
        return False
    record = record or result.with_suffix(".json")
    content = read_json(record) if record.is_file() else {}
    found = provenance_in(content)
    if found is None:
        raise InputError(f"{result}: exists, but {record} holds no provenance; {remedy}")
    different = differences(found, expected=provenance)
    if different:
        raise InputError(f"{result}: exists with another provenance: {different[0]}; {remedy}")
    size = result.stat().st_size
    if content.get("bytes", size) != size:
        raise InputError(f"{result}: found {size} bytes, expected {content['bytes']} as in {record}; {remedy}")
    return True


def write_record(
    result: Path, provenance: dict[str, Any], record: Path | None = None, figures: dict[str, Any] | None = None
) -> None:
    """Write the JSON file of a result: before a result that may be overwritten, else after it, so that a killed run
    leaves no result without provenance.

    Args:
        record: the file to write; None: `result` with the suffix .json.
        figures: other facts, such as metrics; with `bytes`, the size of a complete file.
    """
    content = {**(figures or {}), KEY: provenance}
    write_text(record or result.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
