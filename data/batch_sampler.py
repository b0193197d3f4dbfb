"""Which rank sees which sample at which step: a function of (seed, step) alone.

The samples of all steps form one endless sequence: pass after pass over the data, each in a new random order. A step
takes the next G samples, G being the global batch, and cuts them into equal slices for ranks and micro-batches. The
index of a sample among these G, its slot, is the key of its random numbers. So a step does not depend on the number of
processes, no sample is left out at the end of a pass, and resuming needs the step alone.

torch's DistributedSampler pads or drops at the end of a pass, and its order depends on the number of processes;
accelerate and torchdata skip by reading, or store a state.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from utils.randomness import Stream, permutation, philox


class SampleIndex(NamedTuple):
    """One use of a sample: its index, and the pass over the data; random crops and flips differ from pass to pass."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    dataset_pass: int


def as_sample_index(item: int | SampleIndex) -> SampleIndex:
    """A plain index is in pass 0."""
    return item if isinstance(item, SampleIndex) else SampleIndex(int(item), 0)


class MicroBatch(list[SampleIndex]):
    """The samples of one forward pass, with their step and their slots (B,) in the global batch."""

    def __init__(self, sample_indices: Iterable[SampleIndex], step: int, slots: np.ndarray) -> None:
        super().__init__(sample_indices)
        self.step = step
        self.slots = slots


class GlobalBatchSampler(Sampler[list[SampleIndex]]):
    """Micro-batches of one rank for the steps `first_step` to `last_step - 1`, in order.

    Args:
        num_samples: size n of the data set; less than 2**32.
        first_step: optimizer steps done.
        samples_seen: samples of the steps before `first_step`; None: that many global batches.
        class_ids: (num_samples,); if given, a step's samples are sorted by class before they are cut into slices, so
            that a slice has few classes.
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
        class_ids: np.ndarray | None = None,
    ) -> None:
        assert 0 < num_samples < 2**32
        assert 0 <= rank < world_size
        self.num_samples = num_samples
        self.seed = seed
        self.class_ids = class_ids
        self.micro_batch_size = per_gpu_batch_size
        self.micro_steps = gradient_accumulation_steps
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.last_step = last_step
        self.global_batch_size = per_gpu_batch_size * gradient_accumulation_steps * world_size
        self.samples_seen = first_step * self.global_batch_size if samples_seen is None else samples_seen

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.micro_steps

    def __iter__(self) -> Iterator[MicroBatch]:
        current_pass, order = -1, np.empty(0, np.uint32)
        for step in range(self.last_step - self.first_step):
            start = self.samples_seen + step * self.global_batch_size
            passes, positions = np.divmod(np.arange(start, start + self.global_batch_size), self.num_samples)
            indices = np.empty(self.global_batch_size, np.int64)
            for dataset_pass in range(passes[0], passes[-1] + 1):
                if dataset_pass != current_pass:
                    current_pass, order = dataset_pass, permutation_of_pass(self.num_samples, self.seed, dataset_pass)
                indices[passes == dataset_pass] = order[positions[passes == dataset_pass]]
            slots = np.arange(self.global_batch_size)
            if self.class_ids is not None:
                slots = self.class_ids[indices].argsort(kind="stable")
            for micro_step in range(self.micro_steps):
                first = (self.rank * self.micro_steps + micro_step) * self.micro_batch_size
                mine = slots[first : first + self.micro_batch_size]
                sample_indices = map(SampleIndex, indices[mine].tolist(), passes[mine].tolist())
                yield MicroBatch(sample_indices, self.first_step + step, mine)


def permutation_of_pass(num_samples: int, seed: int, dataset_pass: int) -> np.ndarray:
    """Order of the samples in a pass: (num_samples,) uint32."""
    return permutation(philox(Stream.DATA_ORDER, seed, dataset_pass), num_samples)
