"""The order of the samples: a function of (seed, step), for any number of processes."""

import itertools

import numpy as np
import pytest

from data.batch_sampler import GlobalBatchSampler, SampleIndex, permutation_of_pass


def global_batches(
    num_samples: int, per_gpu: int, accumulation: int, world_size: int, first: int, last: int, seed: int = 3
) -> list[list[SampleIndex]]:
    """Global batches put together from all ranks: ranks one after another, micro-batches within a rank."""
    ranks = [
        list(GlobalBatchSampler(num_samples, per_gpu, accumulation, rank, world_size, seed, first, last))
        for rank in range(world_size)
    ]
    assert all(len(batches) == (last - first) * accumulation for batches in ranks)
    batches = []
    for step in range(last - first):
        micro_batches = [batch for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation]]
        assert all(len(batch) == per_gpu for batch in micro_batches)
        batches.append(list(itertools.chain(*micro_batches)))
    return batches


@pytest.mark.parametrize("num_samples", [5, 24, 100, 1001])
@pytest.mark.parametrize(
    ("per_gpu", "accumulation", "world_size"), [(12, 2, 1), (6, 2, 2), (3, 1, 8), (1, 4, 6), (8, 3, 1)]
)
def test_order_does_not_depend_on_processes(num_samples: int, per_gpu: int, accumulation: int, world_size: int) -> None:
    expected = global_batches(num_samples, 24, 1, 1, 0, 20)
    assert global_batches(num_samples, per_gpu, accumulation, world_size, 0, 20) == expected


@pytest.mark.parametrize("first", [1, 7, 19, 20])
def test_resume_continues_where_the_run_stopped(first: int) -> None:
    assert global_batches(50, 4, 2, 3, first, 20) == global_batches(50, 4, 2, 3, 0, 20)[first:]


def test_passes_are_complete_and_differ() -> None:
    num_samples, steps = 70, 30  # 30 * 24 draws: ten passes and a bit
    draws = list(itertools.chain(*global_batches(num_samples, 24, 1, 1, 0, steps)))
    orders = []
    for dataset_pass, start in enumerate(range(0, len(draws) - num_samples + 1, num_samples)):
        one_pass = draws[start : start + num_samples]
        assert {draw.dataset_pass for draw in one_pass} == {dataset_pass}
        orders.append(tuple(draw.index for draw in one_pass))
        assert sorted(orders[-1]) == list(range(num_samples))
    assert len(orders) == 10
    assert len(set(orders)) == 10


def test_seed_and_length() -> None:
    assert global_batches(50, 4, 1, 1, 0, 5, seed=1) != global_batches(50, 4, 1, 1, 0, 5, seed=2)
    sampler = GlobalBatchSampler(50, 4, 3, 0, 1, 0, first_step=10**9, last_step=10**9 + 2)
    assert len(sampler) == 6
    assert len(list(sampler)) == 6  # a far step is reached at once


def test_permutation_is_fixed_and_small() -> None:
    order = permutation_of_pass(8, seed=42, dataset_pass=3)
    assert order.dtype == np.uint32
    assert order.tolist() == permutation_of_pass(8, 42, 3).tolist()
    assert order.tolist() == [1, 6, 7, 2, 0, 3, 5, 4]  # another order would break the resume of running trainings
