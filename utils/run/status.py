"""`status.json` in the run folder: for a batch system to read when the processes have ended.

The exit status is not enough: torchrun returns 1 whether its workers saved and stopped or crashed.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from utils.distributed import DistributedContext
from utils.errors import InputError, errors_name
from utils.files.atomic import atomic_file
from utils.files.json_file import read_json
from utils.files.lock import owner_inside

STATUS_FILE = "status.json"
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_STATUS = {"completed": 0, "preempted": EXIT_PREEMPTED}


@dataclass
class Status:
    status: str  # running, completed, preempted or failed
    step: int  # optimizer steps done
    reason: str = ""  # the signal, the error, or why the run was complete before its last step
    time: str = ""  # of this file, UTC
    eta_s: float | None = None  # seconds to the last step; null: unknown
    trained_s: float = 0.0  # seconds of training, pauses and earlier starts included
    last_checkpoint: str | None = None
    warning: str = ""  # the last one
    url: str | None = None  # in wandb

    def __str__(self) -> str:
        return f"{self.status} at step {self.step} ({self.reason or 'all steps'})"


class StatusFile:
    """status.json of this launch, which holds the lock of the run folder.

    Attributes:
        now: the status that the next `write` stores.
    """

    def __init__(self, output_dir: Path, ctx: DistributedContext, status: Status, lock_owner: int) -> None:
        """
        Args:
            lock_owner: process id of rank 0.
        """
        self.output_dir = output_dir
        self.ctx = ctx
        self.now = status
        self._lock_owner = lock_owner

    def write(self) -> None:
        """
        Raises:
            OSError: the disk fails; a full one is no error, see `write_status`.
        """
        if self.ctx.is_rank0:
            write_status(self.output_dir, self.now)

    def update(self) -> None:
        """Like `write`, but an error does not end training."""
        with suppress(OSError):
            self.write()

    def fail(self, reason: str) -> None:
        """Record a failure, on the rank that has it. The first failure is kept: later ones may only say that a rank is
        gone. The status of the next launch is kept too, if this rank notices late that its own launch has ended."""
        self.now.status = "failed"
        self.now.reason = reason
        is_of_this_launch = self.ctx.is_rank0 or owner_inside(self.output_dir) in (None, self._lock_owner)
        before = read_status_or_none(self.output_dir)
        if is_of_this_launch and (before is None or before.status != "failed"):
            with suppress(OSError):  # the failure itself is what the user must read
                write_status(self.output_dir, self.now, rank=self.ctx.rank)


def note_failed_start(output_dir: Path, reason: str) -> None:
    """Record that a start led to no run. A completed run keeps its status."""
    before = read_status_or_none(output_dir)
    if before is not None and before.status != "completed":
        with suppress(OSError):
            write_status(output_dir, replace(before, status="failed", reason=f"at the start: {reason}"))


def write_status(output_dir: Path, status: Status, rank: int = 0) -> None:
    """Replace the file atomically; on a full disk, overwrite it in place."""
    status.time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path = output_dir / STATUS_FILE
    text = json.dumps(asdict(status), indent=1) + "\n"
    try:
        with atomic_file(path, f".{rank}.tmp") as partial:  # ranks may fail at the same time
            partial.write_text(text, encoding="utf-8")
    except OSError:
        with errors_name(path), path.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()


def read_status(output_dir: Path) -> Status:
    """
    Raises:
        InputError: no status.json, or a damaged one.
    """
    path = output_dir / STATUS_FILE
    try:
        return Status(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path}: found other keys than those of a run: {error}") from error


def read_status_or_none(output_dir: Path) -> Status | None:
    with suppress(InputError):
        return read_status(output_dir)
    return None
