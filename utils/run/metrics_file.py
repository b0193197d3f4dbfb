"""`metrics.jsonl` in the run folder: every metric of a run, one JSON object per line, append-only."""

import json
import math
import os
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from utils.errors import InputError, environment_error, errors_name

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends to the metrics of a run, even while another process appends too.

    On a full disk, lines are kept in memory until a later write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._unwritten = path, ""

    def begin(self, first_step: int) -> None:
        """Record a start from `first_step`: rows of later steps will be repeated."""
        self._add({"step": first_step, "started": datetime.now(timezone.utc).isoformat(timespec="seconds")})

    def append(self, step: int, values: dict[str, float]) -> None:
        """NaN and infinities, which JSON lacks, become null."""
        self._add({"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}})

    def _add(self, line: dict[str, Any]) -> None:
        self._unwritten += json.dumps(line) + "\n"
        try:
            self.flush()
        except OSError as error:
            warnings.warn(f"{environment_error(error)}; its lines are kept for the next write", stacklevel=4)

    def flush(self) -> None:
        """Append all lines kept in memory, or none; raises OSError if they are still not written."""
        if not self._unwritten:
            return
        with errors_name(self.path):
            with self.path.open("ab+") as file:
                size = file.tell()
                file.seek(max(size - 1, 0))
                is_torn = file.read() not in (b"", b"\n")  # last line cut by a kill
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n\n" * is_torn + self._unwritten)
            except OSError:
                os.truncate(self.path, size)
                raise
        self._unwritten = ""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The history of a run: a row for each step, in order, with `step` and the last value of every name; null is NaN.

    A start removes rows of later steps, which were repeated or abandoned. Raises InputError for a missing file or a
    damaged line, except one cut by a kill.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
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
        is_row = "started" in values or all(isinstance(value, int | float | None) for value in values.values())
        return values if is_row and isinstance(values["step"], int) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
