"""`status.json` in the run folder: what a batch system needs to know when the processes are gone.

The exit status cannot tell: torchrun returns 1 whether the workers saved and stopped or crashed.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from utils.errors import TrainingError

STATUS_FILE = "status.json"
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
LOST_RANK = re.compile(r"gloo|nccl|timed ?out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


@dataclass
class Status:
    status: str  # running, completed, preempted or failed
    step: int  # optimizer steps done
    reason: str = ""  # the signal or the error


@contextmanager
def reported_status(output_dir: Path, first_step: int, process_group_timeout: int) -> Iterator[Status]:
    """Around training: `running` at the start; at the end what the block has set; `failed` after an exception.

    Args:
        process_group_timeout: seconds, for the message about a rank that is gone or hangs.

    Raises:
        TrainingError: instead of the error of the communication library when another rank does not answer.
    """
    rank = int(os.environ.get("RANK", 0))
    status = Status("running", first_step)
    if rank == 0:
        write_status(output_dir, status)
    try:
        yield status
    except BaseException as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, RuntimeError) and dist.is_initialized() and LOST_RANK.search(str(error)):
            reason = (
                f"step {status.step}: another rank is gone or did not answer within training.process_group_timeout="
                f"{process_group_timeout} s ({reason}); the same command continues from the last checkpoint"
            )
            error = TrainingError(f"rank {rank}: {reason}")
        status.status, status.reason = "failed", f"rank {rank}: {reason}"
        write_status(output_dir, status)
        raise error
    if rank == 0:
        write_status(output_dir, status)


def write_status(output_dir: Path, status: Status) -> None:
    """Replace the file in one go. The first failure stays: other ranks only report that they lost the failed one."""
    path = output_dir / STATUS_FILE
    if status.status == "failed" and path.is_file() and read_status(output_dir).status == "failed":
        return
    partial = path.with_name(f"{STATUS_FILE}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(asdict(status)) + "\n")
    partial.replace(path)


def read_status(output_dir: Path) -> Status:
    return Status(**json.loads((output_dir / STATUS_FILE).read_text()))
