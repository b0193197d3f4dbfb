"""SIGTERM and SIGUSR1 ask for a checkpoint and an end; the step in progress is finished first."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Inside `with`: a stop signal sets `received` to its name and does nothing else, however often it comes.

    The end of torchrun counts as a signal too: workers that outlive it would write to a folder that a restart uses.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._parent = os.getppid()

    def requested(self) -> bool:
        if self.received is None and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
            self.received = "torchrun is gone"
        return self.received is not None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


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
