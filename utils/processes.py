"""Work on chunks of items on all CPUs of a machine, without torchrun."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

from tqdm import tqdm

from utils.errors import InputError, TrainingError, environment_error


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    work: Callable[[range], None], chunks: Sequence[range], processes: int
) -> Generator[range, None, None]:
    """Call `work` on every chunk in forked processes, or in this one if `processes` is 1; yields the finished chunks.

    Process i of P takes the chunks i, i + P, ..., so they finish nearly in order. If this process is killed or the
    generator closed, each other process stops after its current chunk. Raises InputError from `work`, also instead of
    an OSError, and TrainingError if a process dies.
    """
    if processes == 1 or len(chunks) == 1:
        for chunk in chunks:
            work(chunk)
            yield chunk
        return
    context = multiprocessing.get_context("fork")  # shares memory; `work` may be a closure
    workers: dict[Connection, BaseProcess] = {}
    try:
        for first in range(min(processes, len(chunks))):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (work, chunks[first::processes], sender, os.getpid())
            workers[receiver] = context.Process(target=_run_worker, args=arguments)
            workers[receiver].start()
            sender.close()  # or the next process would inherit it and hide the end of this one
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


def _run_worker(work: Callable[[range], None], chunks: Sequence[range], sender: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too and ends this process
    tqdm.set_lock(threading.RLock())  # killed while it holds the shared lock, it would stop the parent's progress bars
    for chunk in chunks:
        if os.getppid() != parent:
            return
        try:
            work(chunk)
        except Exception as error:
            line = environment_error(error)
            if line is None:
                raise
            sender.send(InputError(line))
            return
        sender.send(chunk)
