"""All that is measured of training between two lines of the log, joined over the ranks."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor, tensor

from utils.distributed import DistributedContext
from utils.run.clock import StepClock
from utils.run.interval import IntervalMeans, Metrics
from utils.run.performance import Performance

B = TypeVar("B", covariant=True)


class DataIterator(Protocol[B]):
    @property
    def num_skipped(self) -> int: ...  # visits of images that this process could not decode

    def __next__(self) -> B: ...


class Measurements:
    """
    Args:
        skipped_images, trained_s: before this start.
        flops_per_image: of forward and backward pass; None: not told.

    Attributes:
        clock: where the time goes.
    """

    def __init__(
        self,
        ctx: DistributedContext,
        global_batch_size: int,
        skipped_images: int,
        trained_s: float,
        flops_per_image: float | None,
    ) -> None:
        self.ctx, self.clock = ctx, StepClock(trained_s)
        self._means, self._performance = IntervalMeans(ctx), Performance(ctx, global_batch_size, flops_per_image)
        self._skipped_before, self._skipped_here = skipped_images, 0

    def next_batch(self, batches: DataIterator[B]) -> B:
        with self.clock.waiting():
            batch = next(batches)
        self._skipped_here = batches.num_skipped
        return batch

    def add(self, micro_batches: Sequence[Metrics], grad_norm: Tensor) -> None:
        """A step whose losses and gradients are finite."""
        self._means.add(micro_batches, grad_norm)

    @property
    def has_steps(self) -> bool:
        """Anything was added since the last `take`."""
        return self._means.has_steps

    def take(self) -> dict[str, float]:
        """The line of the log for the steps since the last one, equal on all ranks but for the times."""
        times = self.clock.take()
        metrics, of_ranks = self._means.take([self._skipped_here, *self._performance.of_rank(times)])
        metrics["train/skipped_images"] = self._skipped_before + int(sum(numbers[0] for numbers in of_ranks))
        return metrics | self._performance.metrics(times, [numbers[1:] for numbers in of_ranks])

    def count_skipped(self) -> int:
        """Visits of images that could not be decoded, by all ranks and starts; all ranks call."""
        return self._skipped_before + int(self.ctx.all_reduce_sum(tensor(self._skipped_here)))
