"""What a training step gets: samples, and random numbers that belong to them and to the step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch_sampler import permutation_of_pass
from data.codes.store_files import StoreMeta
from data.codes.token_writer import new_token_store
from data.training_batches import (
    TrainingBatches,
    asked_classes,
    drop_class_labels,
    open_codes,
    open_training_data,
    training_classes,
)
from utils.config import load_config
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.randomness import Stream, sample_uniforms
from utils.schema import GeneratorConfig


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "micro_steps"), [(1, 1), (1, 2), (3, 2)])
def test_a_sample_has_the_random_numbers_of_its_slot_in_the_global_batch(
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
        places = labels.argsort(stable=True)  # sorted by class, so that a rank has few classes
        labels = torch.where(drops[:, 0] < 0.5, 5, labels)
        assert torch.equal(torch.cat([batch["index"] for batch in batches_of_step]), index[places])
        assert torch.equal(torch.cat([batch["perturbation_uniforms"] for batch in batches_of_step]), uniforms[places])
        orders = sample_uniforms(9, step, range(size), 17, Stream.TRAINING_ORDERS)
        assert torch.equal(torch.cat([batch["order_uniforms"] for batch in batches_of_step]), orders[places])
        found = [batch["class_labels"][batch["class_rows"]] for batch in batches_of_step]
        assert torch.equal(torch.cat(found), labels[places])
        for batch in batches_of_step:
            assert torch.equal(batch["class_labels"], batch["class_labels"].unique())


@pytest.fixture
def named(tiny_arguments: list[str], tmp_path: Path) -> list[str]:
    """A store whose classes are birch and cedar, and a folder of images of the same classes."""
    store = tmp_path / "codes.tokens"
    meta = StoreMeta(image_seq_len=16, codebook_size=24, class_names=["birch", "cedar"])
    with new_token_store(store, meta) as writer:
        writer.append(np.ones((3, 16), np.int64), np.array([0, 1, 1]))
    for name in ("birch", "cedar"):
        (tmp_path / "images" / name).mkdir(parents=True)
    paths = [
        f"dataset.params.pretokenization={store}",
        f"dataset.params.train_shards_path_or_url={tmp_path / 'images'}",
    ]
    return [*tiny_arguments, "experiment.output_dir=unused", *paths]


def test_class_names_are_those_of_the_codes(named: list[str], tmp_path: Path) -> None:
    assert training_classes(load_config(named)) == (["birch", "cedar"], str(tmp_path / "codes.tokens"))
    images = load_config([*named, "dataset.params.pretokenization=null"])
    assert training_classes(images) == (["birch", "cedar"], str(tmp_path / "images"))
    (tmp_path / "images/alder").mkdir()
    assert training_classes(images) == (["alder", "birch", "cedar"], str(tmp_path / "images"))
    message = r"^dataset\.params\.train_shards_path_or_url=.*images: found other class names than in .*codes\.tokens"
    with pytest.raises(InputError, match=message):
        training_classes(load_config(named))
    with pytest.raises(InputError, match=message):
        open_training_data(load_config(named), tokenizer_sha256="", verify=False)
    codes = load_config([*named, "dataset.params.train_shards_path_or_url=null"])
    assert training_classes(codes) == (["birch", "cedar"], str(tmp_path / "codes.tokens"))
    assert training_classes(load_config([*named[:2], "dataset.params.pretokenization=null"])) is None


def test_names_asked_for_are_those_of_the_weights(named: list[str], tmp_path: Path) -> None:
    asked = load_config([*named, "sampling.class_labels=[cedar,0]"])
    assert asked_classes(asked, None) == [1, 0]
    assert asked_classes(asked, ["fir", "birch", "cedar"]) == [2, 0]
    with pytest.raises(InputError, match=r"found 'cedar', expected 0 to 4 or the name of a class of the weights"):
        asked_classes(asked, ["fir", "birch"])


def test_drop_class_labels() -> None:
    generator = GeneratorConfig(class_label_dropout=0.1, condition_num_classes=10)
    dropped = drop_class_labels(torch.tensor([3, 4, 5]), torch.tensor([0.05, 0.1, 0.9]), generator)
    assert dropped.tolist() == [10, 4, 5]
