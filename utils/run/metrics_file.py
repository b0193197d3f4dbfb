"""`metrics.jsonl` in the run folder: every metric of a run, a line of JSON per step. It is only ever appended to."""

import json
import math
import os
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from utils.errors import InputError, environment_error

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends to the metrics of a run, also to those of a run that another process is writing.

    A full disk is no error: what could not be written waits for the next line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._unwritten = path, ""

    def begin(self, first_step: int) -> None:
        """Note a start that goes on from `first_step`: what the file holds of later steps is about to be run again."""
        self._add({"step": first_step, "started": datetime.now(timezone.utc).isoformat(timespec="seconds")})

    def append(self, step: int, values: dict[str, float]) -> None:
        """NaN and infinities, which JSON lacks, are written as null."""
        self._add({"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}})

    def _add(self, line: dict[str, Any]) -> None:
        self._unwritten += json.dumps(line) + "\n"
        try:
            self.flush()
        except OSError as error:
            warnings.warn(f"{self.path}: {environment_error(error)}; its lines wait for the next ones", stacklevel=4)

    def flush(self) -> None:
        """Append what is not written yet, or nothing of it.

        Raises:
            OSError: it is still not written.
        """
        if not self._unwritten:
            return
        with self.path.open("ab+") as file:
            size = file.tell()
            file.seek(max(size - 1, 0))
            torn = file.read() not in (b"", b"\n")  # by a kill or a power cut
        try:
            with self.path.open("a") as file:
                file.write("\n\n" * torn + self._unwritten)
        except OSError:
            os.truncate(self.path, size)
            raise
        self._unwritten = ""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The history of a run, a row per step in their order: `step`, and the last value of every name; null is NaN.

    A start drops the rows of later steps, whether they were run again or belong to a branch that was left.

    Raises:
        InputError: no such file, or a damaged line, unless it was the last one when the run was killed.
    """
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    rows: dict[float, dict[str, float]] = {}
    for number, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True), start=1):
        values = _parse(line)
        if values is None:
            if line and following and "started" not in (_parse(following) or {}):
                raise InputError(f"{path}: line {number}: found {line[:40]!r}, expected a JSON object with a step")
        elif "started" in values:
            rows = {step: row for step, row in rows.items() if step <= values["step"]}
        else:
            row = {name: math.nan if value is None else value for name, value in values.items()}
            rows.setdefault(values["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
