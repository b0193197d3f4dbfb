"""The provenance of a result: everything that it depends on, by name, in one JSON form.

    {"provenance": {"sampling.seed": 42, ...}, "files": {"x.npz": {"bytes": 9, "sha256": "..."}}, other facts}

A JSON file of this form is next to each result and in each folder of chunk files. A result with a different provenance
is never replaced.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.hashing import file_sha256
from utils.files.json_file import read_json

KEY, OLDER_KEY = "provenance", "made_from"
UNFINISHED = "unfinished"  # in the record of a result that is being made


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
    """Whether `result` exists, complete and with this provenance; raises InputError if it has a different provenance,
    or none, or if a file is not the recorded one.

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
    if content.get(UNFINISHED):
        return False
    problem = problem_of_files(result, record, content)
    if problem is not None:
        raise InputError(f"{result}: exists, but {problem} as in {record}; {remedy}")
    return True


def problem_of_files(result: Path, record: Path, content: dict[str, Any]) -> str | None:
    """`FILE: found X, expected Y` for the first file that is not as its record says; None if all are.

    Args:
        content: content of the file `record`, which may be of an earlier version, with the size of `result` alone.
    """
    older = {result.name: {"bytes": content["bytes"]}} if "bytes" in content else {}
    for name, expected in content.get("files", older).items():
        path = record.parent / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "no file" if size is None else f"{size} bytes"
            return f"{path}: found {found}, expected {expected['bytes']} bytes"
        if "sha256" in expected and (sha256 := file_sha256(path, progress=True)) != expected["sha256"]:
            return f"{path}: found sha256 {sha256[:12]}..., expected {expected['sha256'][:12]}..."
    return None


def describe_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files in a folder, by their path in it."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file, progress=True)}
        for file in files
    }


def write_record(
    result: Path,
    provenance: dict[str, Any],
    record: Path | None = None,
    figures: dict[str, Any] | None = None,
    files: Iterable[Path] = (),
) -> None:
    """Write the JSON file of a result: before a result that is always made again, else after it.

    Args:
        record: the file to write; None: `result` with the suffix .json.
        figures: other facts, such as metrics.
        files: complete files of the result, in the folder of the record, which `is_made` compares.
    """
    record = record or result.with_suffix(".json")
    described = describe_files(record.parent, files)
    content = {**({"files": described} if described else {}), **(figures or {}), KEY: provenance}
    write_text(record, json.dumps(content, indent=1) + "\n")


def write_unfinished_record(result: Path, provenance: dict[str, Any]) -> None:
    """Before a result whose record is complete after it, so that the same command finishes the work of a killed one."""
    write_record(result, provenance, figures={UNFINISHED: True})
