"""What a training step gets: samples, and random numbers that belong to them and to the step."""

import pytest
import torch

from data.batch_sampler import permutation_of_pass
from data.training_batches import TrainingBatches, drop_class_labels, open_codes
from utils.config import load_config
from utils.distributed import DistributedContext
from utils.randomness import Stream, sample_uniforms
from utils.schema import GeneratorConfig


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "micro_steps"), [(1, 1), (1, 2), (3, 2)])
def test_a_sample_has_the_random_numbers_of_its_place_in_the_global_batch(
    tiny_arguments: list[str], workers: int, world_size: int, micro_steps: int
) -> None:
    """Also after a start at step 5, before which the global batch was another one."""
    overrides = [f"dataset.params.num_workers_per_gpu={workers}", "training.per_gpu_batch_size=4", "training.seed=9"]
    overrides.append("model.generator.class_label_dropout=0.5")
    config = load_config([*tiny_arguments, "experiment.output_dir=unused", *overrides])
    store = open_codes(config)
    by_step: dict[int, list[dict[str, torch.Tensor]]] = {5: [], 6: []}
    for rank in range(world_size):
        ctx = DistributedContext(rank, world_size, torch.device("cpu"))
        batches = TrainingBatches(store, config, ctx, micro_steps, range(5, 7), 13, lambda: False, 33, 17)
        for step in by_step:
            by_step[step] += [next(batches) for _ in range(micro_steps)]
    for step, batches_of_step in by_step.items():
        size = 4 * micro_steps * world_size
        drops, uniforms = sample_uniforms(9, step, range(size), 34).split((1, 33), dim=1)
        samples = range(13 + (step - 5) * size, 13 + (step - 4) * size)
        index = torch.tensor(
            [int(permutation_of_pass(len(store), 9, i // len(store))[i % len(store)]) for i in samples]
        )
        labels = torch.from_numpy(store.class_ids[index].astype(int))
        places = labels.argsort(stable=True)  # of the same class side by side, so that a rank has few of them
        labels = torch.where(drops[:, 0] < 0.5, 5, labels)
        assert torch.equal(torch.cat([batch["index"] for batch in batches_of_step]), index[places])
        assert torch.equal(torch.cat([batch["perturbation_uniforms"] for batch in batches_of_step]), uniforms[places])
        orders = sample_uniforms(9, step, range(size), 17, Stream.TRAINING_ORDERS)
        assert torch.equal(torch.cat([batch["order_uniforms"] for batch in batches_of_step]), orders[places])
        found = [batch["class_labels"][batch["class_rows"]] for batch in batches_of_step]
        assert torch.equal(torch.cat(found), labels[places])
        for batch in batches_of_step:
            assert torch.equal(batch["class_labels"], batch["class_labels"].unique())


def test_drop_class_labels() -> None:
    generator = GeneratorConfig(class_label_dropout=0.1, condition_num_classes=10)
    dropped = drop_class_labels(torch.tensor([3, 4, 5]), torch.tensor([0.05, 0.1, 0.9]), generator)
    assert dropped.tolist() == [10, 4, 5]
