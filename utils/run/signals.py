"""SIGTERM and SIGUSR1 ask for a checkpoint and an end; the step in progress is finished first."""

import os
import signal
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


def ignore_stop_signals(worker_id: int) -> None:
    """A `worker_init_fn`: a signal to the whole process group must not take the batches away before the last step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
