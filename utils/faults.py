"""Deliberate faults for the tests of recovery. Nothing happens unless the environment variable REAR_FAULT is set.

    REAR_FAULT=<point>[.<number>][@<rank>][:kill|raise|enospc|sleep]      default action: kill

Each point is just before the named work; the number is the step or chunk:
step: its forward pass
save.begin, save.model, save.optimizer, save.manifest, save.rename, save.prune: in this order, of a checkpoint
chunk.begin, chunk.rename: of a chunk file
join.begin, join.end: of joining all chunks, with the number 0
record: the record of finished completions, with the number 0

Without a number or rank, the fault happens at the first match, on every rank.
"""

import errno
import os
import signal
import time

SLEEP_S = 3600  # longer than any timeout


def fault_point(name: str, number: int) -> None:
    """Die, raise RuntimeError or OSError, or hang here if REAR_FAULT names this point, number and rank."""
    fault = os.environ.get("REAR_FAULT")
    if not fault:
        return
    place, _, action = fault.partition(":")
    point, _, rank = place.partition("@")
    if point not in (name, f"{name}.{number}") or rank not in ("", os.environ.get("RANK", "0")):
        return
    match action or "kill":
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError(f"REAR_FAULT at {name}.{number}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "sleep":
            time.sleep(SLEEP_S)
        case _:
            raise ValueError(f"REAR_FAULT={fault}: expected the action kill, raise, enospc or sleep")
