"""Means of what training measures, from one line of the log to the next."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import DistributedContext

GRAD_NORM = "train/grad_norm"


class Ratio(NamedTuple):
    """A mean over things of which batches hold different numbers: total and number, scalars."""

    total: Tensor
    number: Tensor


Metrics = Mapping[str, Tensor | tuple[Tensor, Tensor]]  # by name in the log; scalars without gradients


class IntervalMeans:
    """Sums on the device, for which nothing waits before `take`."""

    def __init__(self, ctx: DistributedContext) -> None:
        self.ctx, self._names = ctx, list[str]()
        self._clear()

    def _clear(self) -> None:
        self.has_steps = False
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=self.ctx.device)
        self._largest_norm = torch.full((), -torch.inf, device=self.ctx.device)

    def add(self, micro_batches: Sequence[Metrics], grad_norm: Tensor) -> None:
        """The micro-batches of a step on this rank and its gradient norm before clipping, which all ranks share. To be
        called on all ranks, or on none for a step that is not finite."""
        of_step = [*micro_batches[0], GRAD_NORM]
        if self._names != of_step:
            self._names = of_step
            self._clear()
        one = torch.ones_like(grad_norm)
        for metrics in micro_batches:
            totals, counts = zip(*(_ratio(value, one) for value in metrics.values()), strict=True)
            self._sums[:, :-1] += torch.stack([torch.stack(totals), torch.stack(counts)])
        self._sums[:, -1] += torch.stack([grad_norm, one])
        self._largest_norm = torch.maximum(self._largest_norm, grad_norm)
        self.has_steps = True

    def take(self, of_rank: Sequence[float]) -> tuple[dict[str, float], list[list[float]]]:
        """What was added since the last time, in one reduction and one wait for the device; all ranks call.

        Args:
            of_rank: K further numbers of this rank.

        Returns:
            Means over micro-batches, steps and ranks (NaN without a finite step), the largest gradient norm; and the
            further numbers of each rank: size x K.
        """
        numbers = torch.zeros(self.ctx.size, len(of_rank), dtype=torch.float64)
        numbers[self.ctx.rank] = torch.tensor(of_rank, dtype=torch.float64)
        summed = self.ctx.all_reduce_sum(torch.cat([self._sums.flatten(), numbers.flatten().to(self.ctx.device)]))
        largest = self._largest_norm.double()[None]  # equal on all ranks
        reduced = torch.cat([summed, largest]).cpu().split([self._sums.numel(), numbers.numel(), 1])
        totals, counts = reduced[0].view(2, -1)
        means = dict(zip(self._names, (totals / counts).tolist(), strict=True))
        if self._names:
            means[GRAD_NORM + "_max"] = float(reduced[2]) if reduced[2] > -torch.inf else torch.nan
        self._clear()
        return means, reduced[1].view(numbers.shape).tolist()


def _ratio(value: Tensor | tuple[Tensor, Tensor], one: Tensor) -> Ratio:
    return Ratio(*value) if isinstance(value, tuple) else Ratio(value, one)
