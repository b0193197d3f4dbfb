"""What a training step gets: samples, and random numbers that belong to them and to the step."""

import pytest
import torch

from data.training_batches import TrainingBatches, open_codes
from utils.config import load_config
from utils.randomness import sample_uniforms
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
    by_step = {5: [], 6: []}
    for rank in range(world_size):
        world = World(rank, world_size, torch.device("cpu"))
        batches = TrainingBatches(store, config, world, micro_steps, range(5, 7), 13, lambda: False, num_uniforms=34)
        for step in by_step:
            by_step[step] += [next(batches)["uniforms"] for _ in range(micro_steps)]
    for step, uniforms in by_step.items():
        assert torch.equal(torch.cat(uniforms), sample_uniforms(9, step, 0, 4 * micro_steps * world_size, 34))
