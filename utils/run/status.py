"""`status.json` in the run folder: what a batch system needs to know when the processes are gone.

The exit status cannot tell: torchrun returns 1 whether the workers saved and stopped or crashed.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from utils.distributed import DistributedContext
from utils.errors import InputError, TrainingError, environment_error, first_line, is_out_of_memory
from utils.files.atomic import atomic_file
from utils.files.json_file import read_json
from utils.files.lock import owner_inside
from utils.run.signals import StoppedWaitingError, StopSignals

STATUS_FILE = "status.json"
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
LOST_RANK = re.compile(r"gloo|nccl|timed ?out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


@dataclass
class Status:
    status: str  # running, completed, preempted or failed
    step: int  # optimizer steps done
    reason: str = ""  # the signal or the error
    time: str = ""  # when this was written, UTC
    eta_s: float | None = None  # seconds to the last step; null while not known
    trained_s: float = 0.0  # seconds of training, pauses and earlier starts included
    last_checkpoint: str | None = None
    warning: str = ""  # the last one
    url: str | None = None  # of the dashboard

    def __str__(self) -> str:
        return f"{self.status} at step {self.step} ({self.reason or 'all steps'})"


class StatusKeeper:
    """Keeps status.json true: while the run goes on, when it ends, and when a process was killed before it could tell.

    Only who holds the lock of the run folder makes one.

    Attributes:
        has_begun: the run folder is this run's.
        now: what status.json says then.
    """

    def __init__(self, output_dir: Path, ctx: DistributedContext, group_timeout: int, saving_memory: str) -> None:
        self.output_dir, self.ctx, self.group_timeout = output_dir, ctx, group_timeout
        self.saving_memory = saving_memory  # keys that do, for the message when it runs out
        self.has_begun, self._has_written, self.now = False, False, Status("running", 0)
        self._owner = ctx.broadcast_from_rank0(os.getpid)  # of the lock

    def begin(self, step: int) -> list[str]:
        """From now on the run is running; a line for the log if the run before ended without a word."""
        notices = []
        if self.ctx.is_rank0 and (before := read_status_or_none(self.output_dir)) and before.status == "running":
            notices = [f"the start before this one was killed at step {before.step} or later"]
        self.has_begun, self.now = True, Status("running", step)
        return notices

    def progress(
        self, trained_s: float, last_checkpoint: str | None, step_s: float | None = None, steps_left: int = 0
    ) -> None:
        """What `write` is to say of the time.

        Args:
            step_s: seconds of a step; None: not known yet.
        """
        self.now.trained_s, self.now.last_checkpoint = round(trained_s, 1), last_checkpoint
        if step_s is not None:
            self.now.eta_s = round(step_s * steps_left, 1)

    def write(self) -> None:
        if self.ctx.is_rank0:
            write_status(self.output_dir, self.now)
            self._has_written = True

    def update(self) -> None:
        """While running: a full disk must not end the run for this."""
        with suppress(OSError):
            self.write()

    def end(self, is_last: bool, signals: StopSignals) -> None:
        """What `write` is to say then: all steps are done, or a signal has stopped the run before."""
        if is_last:
            self.now.status = "completed"
        else:
            self.now.status, self.now.reason = "preempted", signals.received or "a signal to another rank"

    def note_end(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """To be called with what the run ends with (an exit callback).

        Raises:
            TrainingError: what an error of a communication library means.
        """
        if error is None:
            return
        if not self.has_begun:
            self._note_failed_start(error)
            return
        meaning = explain(error, self)
        if not isinstance(error, SystemExit):  # of a rank that leaves what is to be said to rank 0
            reason = reason_of(meaning) if meaning is not error else f"rank {self.ctx.rank}: {reason_of(error)}"
            self.now.status, self.now.reason = "failed", reason
            if self.ctx.is_rank0 or owner_inside(self.output_dir) in (None, self._owner):  # not yet another launch's
                with suppress(OSError):  # the error itself is what to tell
                    of_this_launch = self._has_written or not self.ctx.is_rank0
                    write_status(self.output_dir, self.now, self.ctx.rank, first_failure_stays=of_this_launch)
        if meaning is not error:
            raise meaning from error

    def _note_failed_start(self, error: BaseException) -> None:
        """A run that is complete stays so; else whoever waits for it must learn that this start led to nothing."""
        before = read_status_or_none(self.output_dir)
        if self.ctx.is_rank0 and before is not None and before.status != "completed":
            with suppress(OSError):
                write_status(
                    self.output_dir, replace(before, status="failed", reason=f"at the start: {reason_of(error)}")
                )


def write_status(output_dir: Path, status: Status, rank: int = 0, first_failure_stays: bool = False) -> None:
    """Replace the file in one go.

    Args:
        first_failure_stays: leave what another rank of this launch says of its failure, for this one may only report
            that it lost that rank.
    """
    status.time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path, text = output_dir / STATUS_FILE, json.dumps(asdict(status), indent=1) + "\n"
    if first_failure_stays:
        before = read_status_or_none(output_dir)
        if before is not None and before.status == "failed":
            return
    try:
        with atomic_file(path, f".{rank}.tmp") as partial:  # ranks that fail together write at the same time
            partial.write_text(text)
    except OSError:
        with path.open("r+") as file:  # on a full disk there is room where the old text stands
            file.write(text)
            file.truncate()


def read_status(output_dir: Path) -> Status:
    """
    Raises:
        InputError: no status.json, or one that is damaged.
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


def explain(error: BaseException, run: StatusKeeper) -> BaseException:
    """The error itself, or for want of memory, a communication library's and a wait without end what it means."""
    where = f"rank {run.ctx.rank}: step {run.now.step}"
    is_continued = "the same command continues from the last checkpoint"
    if isinstance(error, StoppedWaitingError):
        return TrainingError(f"{where}: a stop signal came while this rank waited for data; {is_continued}")
    if is_out_of_memory(error):
        return TrainingError(f"{where}: out of memory ({first_line(error)}); less is needed with {run.saving_memory}")
    is_of_library = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and not isinstance(error, TrainingError) and LOST_RANK.search(str(error))
    )
    if not (dist.is_initialized() and is_of_library):
        return error
    return TrainingError(
        f"{where}: another rank is gone or did not answer within training.process_group_timeout={run.group_timeout} s "
        f"({first_line(error)}); {is_continued}"
    )


def reason_of(error: BaseException) -> str:
    return (environment_error(error) or first_line(error)).splitlines()[0]
