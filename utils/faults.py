"""Deliberate faults for the tests of recovery. Nothing happens unless the environment variable REAR_FAULT is set.

    REAR_FAULT=<point>[.<step>][@<rank>][:kill|raise|enospc|sleep]      without an action: kill

Points: step (before its forward pass); of a checkpoint, in this order: save.begin, save.model, save.optimizer,
save.manifest, save.rename, save.prune; of work in parts, <step> being the number of the part: part.begin, part.rename
and, of joining them, join.begin, join.end. Each is reached just before what it names. Without step or rank it strikes
at the first step and on every rank that reaches it.
"""

import errno
import os
import signal
import time

SLEEP_S = 3600  # longer than any timeout


def fault_point(name: str, step: int) -> None:
    """Die, raise or hang here if REAR_FAULT names this place, this step and this rank.

    Raises:
        RuntimeError, OSError: as asked for.
        ValueError: an action that does not exist.
    """
    fault = os.environ.get("REAR_FAULT")
    if not fault:
        return
    place, _, action = fault.partition(":")
    point, _, rank = place.partition("@")
    if point not in (name, f"{name}.{step}") or rank not in ("", os.environ.get("RANK", "0")):
        return
    match action or "kill":
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError(f"REAR_FAULT at {name}, step {step}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "sleep":
            time.sleep(SLEEP_S)
        case _:
            raise ValueError(f"REAR_FAULT={fault}: expected the action kill, raise, enospc or sleep")
