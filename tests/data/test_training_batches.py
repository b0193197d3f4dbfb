"""What a training step gets: samples, and random numbers that belong to them and to the step."""

import pytest
import torch

from data.training_batches import TrainingBatches, open_codes
from utils.config import load_config
from utils.randomness import Stream, sample_uniforms
from utils.ranks import World


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "micro_steps"), [(1, 1), (1, 2), (3, 2)])
def test_uniforms_are_those_of_the_place_in_the_global_batch(
    tiny_arguments: list[str], workers: int, world_size: int, micro_steps: int
) -> None:
    """Also after a start at step 5, before which the global batch was another one."""
    overrides = [f"dataset.params.num_workers_per_gpu={workers}", "training.per_gpu_batch_size=4", "training.seed=9"]
    config = load_config([*tiny_arguments, "experiment.output_dir=unused", *overrides])
    store = open_codes(config)
    by_step: dict[int, list[dict[str, torch.Tensor]]] = {5: [], 6: []}
    for rank in range(world_size):
        world = World(rank, world_size, torch.device("cpu"))
        batches = TrainingBatches(store, config, world, micro_steps, range(5, 7), 13, lambda: False, 34, 17)
        for step in by_step:
            by_step[step] += [next(batches) for _ in range(micro_steps)]
    streams = {"uniforms": (34, Stream.TRAINING_NOISE), "order_uniforms": (17, Stream.TRAINING_ORDERS)}
    for step, parts in by_step.items():
        for name, (width, stream) in streams.items():
            found = torch.cat([part[name] for part in parts])
            assert torch.equal(found, sample_uniforms(9, step, 0, 4 * micro_steps * world_size, width, stream))
