"""Where the time of a run goes: into steps, within these into waiting for data, and between them into pauses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Times:
    """Of the steps since the last line of the log, in seconds.

    The first step after a start is in none of them but `pauses`: it compiles, allocates and fills caches.
    """

    steps: int = 0
    in_steps: float = 0.0
    waiting: float = 0.0  # for data, within the steps
    pauses: float = 0.0  # saves, sample grids and held-out numbers, between the steps


class StepClock:
    """Measures the time of this process; the guard of each step waits for the device, so that it is the device's too.

    Args:
        trained_s: seconds of training before this start.
    """

    def __init__(self, trained_s: float = 0.0) -> None:
        self._before, self._steps_done = trained_s, 0
        self._interval, self._waited = Times(), 0.0
        self.start()

    def start(self) -> None:
        """The first step begins."""
        self._started = self._step_started = time.perf_counter()

    @property
    def trained_s(self) -> float:
        """Seconds of training up to now, with pauses and with those of earlier starts."""
        return self._before + time.perf_counter() - self._started

    @property
    def seconds_per_step(self) -> float | None:
        """Since this start and with pauses, as a forecast; None in its first steps."""
        if self._steps_done < 2:
            return None
        return (time.perf_counter() - self._second_step) / (self._steps_done - 1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data within a step."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what interrupts training between two steps; a pause within a pause counts once."""
        begun, inner = time.perf_counter(), -self._interval.pauses
        try:
            yield
        finally:
            inner += self._interval.pauses
            paused = time.perf_counter() - begun - inner
            self._interval.pauses += paused
            self._step_started += paused

    def step_done(self) -> None:
        now = time.perf_counter()
        if self._steps_done:
            self._interval.steps += 1
            self._interval.in_steps += now - self._step_started
            self._interval.waiting += self._waited
        else:
            self._second_step = now
        self._steps_done, self._step_started, self._waited = self._steps_done + 1, now, 0.0

    def take(self) -> Times:
        """The times since the last call."""
        times, self._interval = self._interval, Times()
        return times
