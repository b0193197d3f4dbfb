"""Metrics of the steps since the last log line: means over steps and ranks, speed, waiting for data, memory."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from utils.distributed import DistributedContext
from utils.run.estimates import GIB, peak_flops

B = TypeVar("B", covariant=True)
# A scalar, or (sum, count) of a mean over items whose number differs between batches; without gradients.
Metric = Tensor | tuple[Tensor, Tensor]
GRAD_NORM = "train/grad_norm"


class DataIterator(Protocol[B]):
    @property
    def num_skipped(self) -> int: ...  # unreadable images that this rank has left out since its start

    def __next__(self) -> B: ...


class IntervalMeans:
    """Sums on the device since the last log line; nothing waits for the device before `reduce`.

    Attributes:
        has_steps: a step was added since the last `reduce`.
    """

    def __init__(self, ctx: DistributedContext) -> None:
        self.ctx = ctx
        self._names: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self.has_steps = False
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=self.ctx.device)  # totals, counts
        self._largest_norm = torch.full((), -torch.inf, device=self.ctx.device)

    def add(self, micro_batches: Sequence[Mapping[str, Metric]], grad_norm: Tensor) -> None:
        """Add the metrics of a step's micro-batches on this rank, by key, and its gradient norm before clipping, which
        is equal on all ranks. Call it on all ranks or on none."""
        names = [*micro_batches[0], GRAD_NORM]
        if self._names != names:
            self._names = names
            self._reset()
        one = torch.ones_like(grad_norm)
        for metrics in micro_batches:
            pairs = [value if isinstance(value, tuple) else (value, one) for value in metrics.values()]
            totals = torch.stack([total for total, _ in pairs])
            counts = torch.stack([count for _, count in pairs])
            self._sums[:, :-1] += torch.stack([totals, counts])
        self._sums[:, -1] += torch.stack([grad_norm, one])
        self._largest_norm = torch.maximum(self._largest_norm, grad_norm)
        self.has_steps = True

    def reduce(self, rank_values: Sequence[float]) -> tuple[dict[str, float], list[list[float]]]:
        """Reduce and reset the sums, in one reduction and one wait for the device. All ranks call it.

        `rank_values` are K host values. Returns the means over micro-batches, steps and ranks (NaN without a finite
        step) with the largest gradient norm, and the K values of every rank (size x K).
        """
        numbers = torch.zeros(self.ctx.size, len(rank_values), dtype=torch.float64)
        numbers[self.ctx.rank] = torch.tensor(rank_values, dtype=torch.float64)
        summed = self.ctx.all_reduce_sum(torch.cat([self._sums.flatten(), numbers.flatten().to(self.ctx.device)]))
        largest_norm = self._largest_norm.double()[None]
        on_host = torch.cat([summed, largest_norm]).cpu()
        sums, numbers_of_ranks, largest = on_host.split([self._sums.numel(), numbers.numel(), 1])
        totals, counts = sums.view(2, -1)
        means = dict(zip(self._names, (totals / counts).tolist(), strict=True))
        if self._names:
            means[GRAD_NORM + "_max"] = largest.item() if largest > -torch.inf else torch.nan
        self._reset()
        return means, numbers_of_ranks.view(numbers.shape).tolist()


class TrainingMetrics:
    """Measurements between two log lines. Wall-clock times include the device's work, since the check for finite
    losses synchronizes once per step. The first step after a launch, which compiles and allocates, is not counted.

    Args:
        skipped_images, trained_s: totals of earlier launches.
        flops_per_image: FLOPs of forward and backward pass, for perf/mfu_pct; None: unknown.
    """

    def __init__(
        self,
        ctx: DistributedContext,
        global_batch_size: int,
        skipped_images: int = 0,
        trained_s: float = 0.0,
        flops_per_image: float | None = None,
    ) -> None:
        self.ctx = ctx
        self.global_batch_size = global_batch_size
        self.flops_per_image = flops_per_image
        self.means = IntervalMeans(ctx)
        self.on_gpu = ctx.device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(ctx.device)) if self.on_gpu else None
        self._skipped_before = skipped_images
        self._skipped_here = 0
        self._alloc_retries = 0
        self._trained_before = trained_s
        self._steps_done = 0
        self._pause_depth = 0
        self.start()

    def start(self) -> None:
        """Start timing, before the first step."""
        self._started = time.perf_counter()
        self._first_step_done = self._started
        self._start_interval()

    def _start_interval(self) -> None:
        self._interval_started = time.perf_counter()
        self._steps = 0
        self._waited_s = 0.0
        self._paused_s = 0.0

    @property
    def trained_s(self) -> float:
        """Seconds of training, with pauses and earlier launches."""
        return self._trained_before + time.perf_counter() - self._started

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of this launch, with pauses; None before the second step is done."""
        if self._steps_done < 2:
            return None
        return (time.perf_counter() - self._first_step_done) / (self._steps_done - 1)

    def next_batch(self, batches: DataIterator[B]) -> B:
        started = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - started
        self._skipped_here = batches.num_skipped
        return batch

    def end_step(self) -> None:
        self._steps += 1
        self._steps_done += 1
        if self._steps_done == 1:
            self._first_step_done = time.perf_counter()
            self._start_interval()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Measure work between two steps as a pause; nested pauses count once."""
        started = time.perf_counter()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._paused_s += time.perf_counter() - started

    def skipped_images(self) -> int:
        """Unreadable images that all ranks and launches have left out. All ranks call it."""
        return self._skipped_before + int(self.ctx.all_reduce_sum(torch.tensor(self._skipped_here)))

    def log_line(self) -> dict[str, float]:
        """The values of the steps since the last call, equal on all ranks except for times. All ranks call it."""
        in_steps_s = time.perf_counter() - self._interval_started - self._paused_s
        peak_bytes, retries = self._memory_of_rank()
        line, of_ranks = self.means.reduce([self._skipped_here, self._waited_s, peak_bytes, retries])
        skipped, waited_s, peaks, all_retries = zip(*of_ranks, strict=True)
        line["train/skipped_images"] = self._skipped_before + int(sum(skipped))
        line["perf/pause_s"] = self._paused_s
        if self.on_gpu:
            line["perf/memory_gib"] = max(peaks) / GIB
            line["perf/alloc_retries"] = sum(all_retries)
        if self._steps > 0:
            images_per_s = self._steps * self.global_batch_size / in_steps_s
            line["perf/images_per_s"] = images_per_s
            line["perf/images_per_s_per_gpu"] = images_per_s / self.ctx.size
            line["perf/step_ms"] = 1000 * in_steps_s / self._steps
            line["perf/data_wait_pct"] = 100 * max(waited_s) / in_steps_s
            if self.peak_flops is not None and self.flops_per_image is not None:
                flops_per_s = self.flops_per_image * images_per_s / self.ctx.size
                line["perf/mfu_pct"] = 100 * flops_per_s / self.peak_flops
        self._start_interval()
        return line

    def _memory_of_rank(self) -> tuple[float, float]:
        """Peak bytes in use, and CUDA allocator retries since the last call."""
        if not self.on_gpu:
            return 0.0, 0.0
        statistics = torch.cuda.memory_stats(self.ctx.device)
        torch.cuda.reset_peak_memory_stats(self.ctx.device)
        retries = statistics["num_alloc_retries"] - self._alloc_retries
        self._alloc_retries = statistics["num_alloc_retries"]
        return statistics["active_bytes.all.peak"], retries
