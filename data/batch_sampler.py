"""Which rank sees which sample at which step: a function of (seed, step) alone.

The samples of all steps form one endless sequence: pass after pass over the data, each in an order of its own. A step
takes the next G samples, G being the global batch, and cuts them into equal slices for ranks and micro-batches. So the
order does not depend on the number of processes, no sample is left out at the end of a pass, and the position in the
data is the step.

Our own, for torch's DistributedSampler pads or drops at the end of a pass and its order depends on the number of
processes, and the skipping of accelerate and torchdata reads or stores what here is a function of the step.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from utils.randomness import Stream, permutation, philox


class Visit(NamedTuple):
    """One use of a sample: which one, in which pass over the data; random crops and flips differ from pass to pass."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    pass_number: int


def as_visit(item: int | Visit) -> Visit:
    """A plain index is a visit in pass 0."""
    return item if isinstance(item, Visit) else Visit(int(item), 0)


class MicroBatch(list[Visit]):
    """The samples of one forward pass, with their step and the place of the first one in the global batch."""

    def __init__(self, visits: Iterable[Visit], step: int, first: int) -> None:
        super().__init__(visits)
        self.step, self.first = step, first


class GlobalBatchSampler(Sampler[list[Visit]]):
    """Micro-batches of one rank for the steps `first_step` to `last_step - 1`, in order.

    Args:
        num_samples: size n of the data set; less than 2**32.
        first_step: optimizer steps done; all the state there is, as long as the global batch stays the same.
        samples_seen: samples of the steps before `first_step`; None: that many global batches.
    """

    def __init__(
        self,
        num_samples: int,
        per_gpu_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        samples_seen: int | None = None,
    ) -> None:
        assert 0 < num_samples < 2**32
        assert 0 <= rank < world_size
        self.num_samples, self.seed = num_samples, seed
        self.micro_batch_size, self.micro_steps = per_gpu_batch_size, gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self.first_step, self.last_step = first_step, last_step
        self.global_batch_size = per_gpu_batch_size * gradient_accumulation_steps * world_size
        self.samples_seen = first_step * self.global_batch_size if samples_seen is None else samples_seen

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.micro_steps

    def __iter__(self) -> Iterator[MicroBatch]:
        current_pass, order = -1, np.empty(0, np.uint32)
        for micro_batch in range(len(self)):
            step, micro_step = divmod(micro_batch, self.micro_steps)
            first = (self.rank * self.micro_steps + micro_step) * self.micro_batch_size
            start = self.samples_seen + step * self.global_batch_size + first
            visits = []
            for sample_number in range(start, start + self.micro_batch_size):
                pass_number, position = divmod(sample_number, self.num_samples)
                if pass_number != current_pass:
                    current_pass, order = pass_number, order_of_pass(self.num_samples, self.seed, pass_number)
                visits.append(Visit(int(order[position]), pass_number))
            yield MicroBatch(visits, self.first_step + step, first)


def order_of_pass(num_samples: int, seed: int, pass_number: int) -> np.ndarray:
    """Order of the samples in a pass: (num_samples,) uint32."""
    return permutation(philox(Stream.DATA_ORDER, seed, pass_number), num_samples)
