"""Durations on the present device."""

import statistics
import time
from collections.abc import Callable

import torch

MEASURED_CALLS = 3


def median_seconds(function: Callable[[], object]) -> float:
    """Median wall time of some calls, each until the GPU is done, after one that is not counted."""
    times = []
    for _ in range(1 + MEASURED_CALLS):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
