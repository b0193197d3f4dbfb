"""Warnings that a user would want to be woken for, found in what is logged."""

import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, pstdev

from utils.schedules import schedule_warnings
from utils.schema import Config

HISTORY = 128  # lines of the log
ENOUGH = 32  # lines, before a spike or a slow-down can be told from what is normal
SPIKE_SIGMAS = 6
SPIKING = ("train/loss", "train/grad_norm_max")
SLOW = 0.7  # of the median throughput
MUCH_WAITING_PCT = 10
IN_A_ROW = 3  # lines for which throughput or waiting must be bad
CHECKPOINTS_OF_SPACE = 2
PAUSE_S = 3600  # between two warnings of one kind


class Alerts:
    """Tells a warning of each kind at most once an hour.

    Args:
        tell: gets a title and the text.
        now: seconds.
    """

    def __init__(self, tell: Callable[[str, str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._now = tell, now
        self._last: dict[str, float] = {}
        self._history: dict[str, deque[float]] = {}
        self._bad_lines: dict[str, int] = {}

    def warn(self, kind: str, text: str) -> None:
        now = self._now()
        if now - self._last.get(kind, -math.inf) >= PAUSE_S:
            self._last[kind] = now
            self._tell(kind, text)

    def examine(self, metrics: dict[str, float]) -> None:
        """Look at a line of the log."""
        for name in SPIKING:
            self._look_for_spike(name, metrics.get(name, math.nan))
        self._look_for_slowness(metrics.get("perf/images_per_s", math.nan))
        waiting = metrics.get("perf/data_wait_pct", 0.0)
        if self._bad_in_a_row("data wait", waiting > MUCH_WAITING_PCT):
            self.warn(
                "data wait",
                f"{waiting:.0f} % of the time goes into waiting for data; more dataset.params.num_workers_per_gpu, or "
                "codes instead of images, may help",
            )
        if metrics.get("perf/alloc_retries", 0) > 0:
            self.warn("memory", "the GPU's memory is nearly full: allocations had to be tried again, which is slow")

    def check_disk(self, folder: Path, checkpoint_bytes: float) -> None:
        """Whether the next checkpoints fit."""
        try:
            free = shutil.disk_usage(folder).free
        except OSError:  # saves tell of it
            return
        if free < CHECKPOINTS_OF_SPACE * checkpoint_bytes:
            self.warn("disk", f"{free / 1e9:.3g} GB free in {folder}, a checkpoint needs {checkpoint_bytes / 1e9:.3g}")

    def check_schedules(self, config: Config) -> None:
        """Whether they end within the run."""
        if found := schedule_warnings(config):
            self.warn("schedule", "; ".join(found))

    def _look_for_spike(self, name: str, value: float) -> None:
        history = self._history.setdefault(name, deque(maxlen=HISTORY))
        if not math.isfinite(value):
            return
        if len(history) >= ENOUGH:
            middle, sigma = mean(history), pstdev(history)
            if value > middle + SPIKE_SIGMAS * sigma:
                self.warn(
                    f"spike of {name}",
                    f"{name} is {value:.4g}, the last {len(history)} lines of the log have {middle:.4g} +- {sigma:.2g}",
                )
        history.append(value)

    def _look_for_slowness(self, images_per_s: float) -> None:
        history = self._history.setdefault("throughput", deque(maxlen=HISTORY))
        if not math.isfinite(images_per_s):
            return
        usual = median(history) if len(history) >= ENOUGH else 0.0
        if self._bad_in_a_row("throughput", images_per_s < SLOW * usual):
            self.warn("throughput", f"{images_per_s:.4g} images/s, the median is {usual:.4g}")
        history.append(images_per_s)

    def _bad_in_a_row(self, kind: str, is_bad: bool) -> bool:
        self._bad_lines[kind] = self._bad_lines.get(kind, 0) + 1 if is_bad else 0
        return self._bad_lines[kind] >= IN_A_ROW
