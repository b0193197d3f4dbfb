"""Errors during training: explained to the user and recorded in status.json."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from utils.errors import TrainingError, environment_error, first_line, is_out_of_memory
from utils.run.signals import StoppedWaitingError
from utils.run.status import StatusFile

LOST_RANK = re.compile(r"gloo|nccl|timed ?out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
RESUME = "the same command resumes from the last checkpoint"


@contextmanager
def failures_recorded(status: StatusFile, memory_hint: str, group_timeout_s: int) -> Iterator[None]:
    """Record an error inside in status.json, and raise it; errors about memory, lost ranks and waiting for data are
    raised as TrainingError. `memory_hint`: what to change when memory runs out."""
    try:
        yield
    except BaseException as error:
        rank = f"rank {status.ctx.rank}"
        meaning = explained(error, f"{rank}: step {status.now.step}", memory_hint, group_timeout_s)
        if not isinstance(error, SystemExit):  # of a rank that leaves the message to rank 0
            status.fail(reason_of(meaning) if meaning is not error else f"{rank}: {reason_of(error)}")
        if meaning is not error:
            raise meaning from error
        raise


def explained(error: BaseException, where: str, memory_hint: str, group_timeout_s: int) -> BaseException:
    """The TrainingError for an error about memory, lost ranks or waiting for data; else the error itself."""
    if isinstance(error, StoppedWaitingError):
        return TrainingError(f"{where}: a stop signal came while this rank waited for data; {RESUME}")
    if is_out_of_memory(error):
        return TrainingError(f"{where}: out of memory ({first_line(error)}); to need less: {memory_hint}")
    if dist.is_initialized() and _is_of_communication(error):
        return TrainingError(
            f"{where}: another rank is gone or did not answer within training.process_group_timeout={group_timeout_s} "
            f"s ({first_line(error)}); {RESUME}"
        )
    return error


def _is_of_communication(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, TrainingError)
    return is_plain and LOST_RANK.search(str(error)) is not None


def reason_of(error: BaseException) -> str:
    """One line."""
    return (environment_error(error) or first_line(error)).splitlines()[0]
