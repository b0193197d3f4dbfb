"""Parts of the check, and ranks of a training run, in processes of their own.

They are forked: what is imported here is imported in all. So neither the check itself nor a part that starts ranks may
ask CUDA for anything before, not even whether there is a GPU: CUDA does not survive a fork.
"""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch

from scripts.gpu_checks.findings import Findings, Machine, SkippedError
from utils.errors import first_line

FORK = multiprocessing.get_context("fork")
ENDS = "runs to its end"
Check = Callable[[Findings, Machine, Path], None]


def run_part(check: Check, findings: Findings, machine: Machine, work: Path, log: Path, seconds: float) -> None:
    """Run a part; whatever becomes of it, this returns, and nothing that it has started is left.

    Args:
        work: a folder for its files.
        log: gets what it prints.
        seconds: after which it is killed.
    """
    process = FORK.Process(target=_be_part, args=(check, findings, machine, work, log))
    process.start()
    try:
        process.join(seconds)
        if process.is_alive():
            findings.fail(ENDS, f"still running after {seconds:.0f} s, killed")
        elif process.exitcode:
            findings.fail(ENDS, f"ended by {ending(process.exitcode)}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(cast(int, process.pid), signal.SIGKILL)
        process.kill()
        process.join()


def _be_part(check: Check, findings: Findings, machine: Machine, work: Path, log: Path) -> None:
    os.setsid()  # the group of all that it starts
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    # Results are compared bit for bit, and a number of threads rounds its own way; and after the threads of OpenMP have
    # run, what is forked here would wait for them for ever.
    torch.set_num_threads(1)
    try:
        check(findings, machine, work)
    except SkippedError as reason:
        findings.skip("", str(reason))
    except BaseException as error:
        traceback.print_exc()
        findings.fail(ENDS, f"{type(error).__name__}: {first_line(error)}")
    sys.stdout.flush()
    sys.stderr.flush()


def start_ranks(function: Callable[..., object], *arguments: Any, ranks: int = 1, **environment: str) -> list[Any]:
    """Processes that run a function as the ranks of a launch."""
    addresses: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        addresses = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = [
        FORK.Process(target=_be_rank, args=(function, arguments, {**environment, **address})) for address in addresses
    ]
    for process in started:
        process.start()
    return started


def _be_rank(function: Callable[..., object], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    function(*arguments)


def run_ranks(function: Callable[..., object], *arguments: Any, ranks: int = 1) -> None:
    """Run a function to its end as the ranks of a launch.

    Raises:
        RuntimeError: one of them failed; the others are killed.
    """
    running: dict[int, BaseProcess] = {
        process.sentinel: process for process in start_ranks(function, *arguments, ranks=ranks)
    }
    while running:
        for sentinel in cast(list[int], wait(list(running))):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                for other in running.values():
                    other.kill()
                raise RuntimeError(f"a process of {ranks} ended by {ending(process.exitcode)}")


def ending(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit status {exitcode}"
