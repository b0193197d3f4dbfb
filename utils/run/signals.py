"""Signals that stop a run after its step in progress, and stack traces of a run that hangs."""

import ctypes
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
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # Ctrl-C, and a terminal that is closed
SHOW_STACKS = signal.SIGUSR2
SAME_PRESS_S = 1.0  # workers get a Ctrl-C from the terminal and again from torchrun
STDERR = 2
OF_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}  # variables that torchrun and accelerate set
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_on_sigterm() -> None:
    """SIGTERM ends this process, also as PID 1 of a container, and arrives when its launcher is gone: an orphan would
    keep the device and the lock of a folder that a restart uses."""
    if OF_LAUNCHERS & os.environ.keys():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getpid() == 1:  # the kernel drops signals to PID 1 that have no handler
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


class StopSignals:
    """Inside `with`, a stop signal only sets `received` to its name; a second Ctrl-C raises KeyboardInterrupt. SIGUSR2
    prints the stacks of all threads.

    Terminal signals that were ignored before (nohup, background jobs) stay ignored.

    Attributes:
        received: name of the last stop signal; None without one.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, object] = {}

    def requested(self) -> bool:
        return self.received is not None

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            if number not in FROM_TERMINAL or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        faulthandler.register(SHOW_STACKS, file=STDERR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        faulthandler.unregister(SHOW_STACKS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > SAME_PRESS_S:
            raise KeyboardInterrupt


@contextmanager
def stacks_of_a_hang(limit_s: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call at every step; without a call for `limit_s` seconds, the stacks of all threads are
    printed, even while they wait in a library."""
    try:
        yield lambda: faulthandler.dump_traceback_later(limit_s, file=STDERR)
    finally:
        faulthandler.cancel_dump_traceback_later()


def end_with_parent_only(worker_id: int) -> None:
    """A `worker_init_fn`: stop signals end the worker only if its parent sent them, as Python does at exit. A signal to
    the process group must not stop the batches before the last step. The signals are blocked and a thread waits for
    them, to see the sender."""
    parent = os.getppid()
    sys.excepthook = lambda *_: None  # of the thread that sends batches; the parent reports its errors in one line
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class StoppedWaitingError(Exception):
    """A stop signal arrived while this process waited for data that did not arrive."""
