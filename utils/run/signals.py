"""Signals that ask for a checkpoint and an end; the step in progress is finished first."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # Ctrl-C, and the end of the terminal
SHOW_STACKS = signal.SIGUSR2
SAME_PRESS_S = 1.0  # torchrun passes Ctrl-C on to workers that the terminal has told already
STDERR = 2


class StopSignals:
    """Inside `with`: a stop signal sets `received` to its name and does nothing else, however often it comes. Only a
    second Ctrl-C raises KeyboardInterrupt, as without this. SIGUSR2 prints where all threads stand.

    A signal of the terminal that was ignored stays so: `nohup` and background jobs of a shell ask for that. The end of
    torchrun counts as a signal too: workers that outlive it would write to a folder that a restart uses.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._parent, self._interrupted_at = os.getppid(), 0.0

    def requested(self) -> bool:
        if self.received is None and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
            self.received = "torchrun is gone"
        return self.received is not None

    def __enter__(self) -> "StopSignals":
        ignored = {number for number in OF_A_TERMINAL if signal.getsignal(number) == signal.SIG_IGN}
        caught = [number for number in STOP_SIGNALS if number not in ignored]
        self._previous = {number: signal.signal(number, self._receive) for number in caught}
        faulthandler.register(SHOW_STACKS, file=STDERR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        faulthandler.unregister(SHOW_STACKS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received, now = signal.Signals(number).name, time.monotonic()
        if number != signal.SIGINT:
            return
        if self._interrupted_at and now - self._interrupted_at > SAME_PRESS_S:
            raise KeyboardInterrupt
        self._interrupted_at = self._interrupted_at or now


@contextmanager
def stacks_of_a_hang(limit_s: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call at every step: when it was not called for `limit_s`, it is printed where all threads
    stand. A thread of its own does so, also while the others wait in a library."""
    try:
        yield lambda: faulthandler.dump_traceback_later(limit_s, file=STDERR)
    finally:
        faulthandler.cancel_dump_traceback_later()


def end_with_parent_only(worker_id: int) -> None:
    """A `worker_init_fn`: stop signals end the worker if they come from its parent, which is how Python ends its
    children at exit, and do nothing else: one to the whole process group must not take away the batches before the last
    step. To tell them apart they are blocked and waited for in a thread."""
    parent = os.getppid()
    sys.excepthook = lambda *_: None  # of the thread that hands over batches; the parent says in one line what it means
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class StoppedWaitingError(Exception):
    """A stop signal came while this process waited for data that do not come."""
