"""Work on many items, on all CPUs of a machine and without torchrun; a block is a range of consecutive items."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

from utils.errors import InputError, TrainingError


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    work: Callable[[range], None], blocks: Sequence[range], processes: int
) -> Generator[range, None, None]:
    """Do `work` on every block in forked processes, or here if `processes` is 1; yields the blocks that are done.

    Process i takes every P-th block from the i-th on, so blocks are done nearly in order. No process outlives this one
    by more than a block, nor the end of the iteration.

    Raises:
        InputError: from `work`.
        TrainingError: a process has died.
    """
    if processes == 1 or len(blocks) == 1:
        for block in blocks:
            work(block)
            yield block
        return
    context = multiprocessing.get_context("fork")  # shares what is in memory; `work` may be a closure
    workers: dict[Connection, BaseProcess] = {}
    try:
        for first in range(min(processes, len(blocks))):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (work, blocks[first::processes], sender, os.getpid())
            workers[receiver] = context.Process(target=_work_through, args=arguments)
            workers[receiver].start()
            sender.close()  # the next process must not inherit it, or this one's end would go unnoticed
        while workers:
            for receiver in cast(list[Connection], wait(list(workers))):
                try:
                    message = receiver.recv()
                except EOFError:
                    process = workers.pop(receiver)
                    process.join()
                    if process.exitcode:
                        raise TrainingError(f"a worker process ended with exit code {process.exitcode}") from None
                    continue
                if isinstance(message, InputError):
                    raise message
                yield message
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _work_through(work: Callable[[range], None], blocks: Sequence[range], sender: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    for block in blocks:
        if os.getppid() != parent:
            return
        try:
            work(block)
        except InputError as error:
            sender.send(error)
            return
        sender.send(block)
