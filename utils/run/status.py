"""`status.json` in the run folder: what a batch system needs to know when the processes are gone.

The exit status cannot tell: torchrun returns 1 whether the workers saved and stopped or crashed.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from utils.errors import TrainingError
from utils.files.atomic import complete_file
from utils.ranks import World
from utils.run.signals import StoppedWaitingError

STATUS_FILE = "status.json"
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
LOST_RANK = re.compile(r"gloo|nccl|timed ?out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


@dataclass
class Status:
    status: str  # running, completed, preempted or failed
    step: int  # optimizer steps done
    reason: str = ""  # the signal or the error


def write_status(output_dir: Path, status: Status, rank: int = 0) -> None:
    """Replace the file in one go. The first failure stays: other ranks only report that they lost the failed one."""
    path = output_dir / STATUS_FILE
    if status.status == "failed" and path.is_file() and read_status(output_dir).status == "failed":
        return
    with complete_file(path, f".{rank}.tmp") as partial:  # ranks that fail together write at the same time
        partial.write_text(json.dumps(asdict(status)) + "\n")


def read_status(output_dir: Path) -> Status:
    return Status(**json.loads((output_dir / STATUS_FILE).read_text()))


def explain(error: BaseException, step: int, world: World, group_timeout: int) -> BaseException:
    """The error itself, or for that of a communication library or a wait without end one that says what it means."""
    if isinstance(error, StoppedWaitingError):
        return TrainingError(
            f"rank {world.rank}: step {step}: a stop signal came while this rank waited for data; the same command "
            "continues from the last checkpoint"
        )
    if not (isinstance(error, RuntimeError) and dist.is_initialized() and LOST_RANK.search(str(error))):
        return error
    return TrainingError(
        f"rank {world.rank}: step {step}: another rank is gone or did not answer within "
        f"training.process_group_timeout={group_timeout} s ({first_line(error)}); the same command continues from the "
        "last checkpoint"
    )


def first_line(error: BaseException) -> str:
    """The first line of its message, or its kind if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
