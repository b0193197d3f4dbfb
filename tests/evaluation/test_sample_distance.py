"""The distance that training logs, against the evaluator's for the same images."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import sample_distance
from evaluation.collect import ImagesInMemory
from evaluation.evaluator import Evaluator
from evaluation.inception import CACHED_NAMES
from evaluation.sample_distance import SampleDistance, find_extractor
from tests.evaluation.made_up import StubExtractor, blocky_images
from tests.processes import run_ranks
from utils.config import load_config
from utils.config_checks import check_training
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, NonFiniteError


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of torch hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


def images() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(0)
    return blocky_images(random, 10, 16), blocky_images(random, 12, 16)


def stub_distance(ctx: DistributedContext) -> tuple[dict[str, float], list[list[int]]]:
    """Of the cheap back end, and the numbers that were asked for at a time."""
    validation, samples = images()
    asked = []

    def generate(numbers: list[int]) -> np.ndarray:
        asked.append(numbers)
        return samples[numbers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_distance, "find_extractor", lambda device, needed_by: ("frechet_stub", StubExtractor()))
        distance = SampleDistance(ImagesInMemory(validation), 12, 5, ctx)
    assert distance(generate) == distance(lambda numbers: samples[numbers])
    return distance(lambda numbers: samples[numbers]), asked


def test_the_distance_is_the_evaluators(empty_cache: Path, tmp_path: Path, alone: DistributedContext) -> None:
    validation, samples = images()
    for name, array in (("validation", validation), ("samples", samples)):
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    files = (tmp_path / "validation.npz", tmp_path / "samples.npz")
    evaluator = Evaluator(files[0], alone, "efficientnet_lite0", batch_size=5)
    expected = evaluator(evaluator.open(files[1]))["metrics"]["frechet_distance"]
    distance = SampleDistance(ImagesInMemory(validation), 12, 5, alone)
    assert distance(lambda numbers: samples[numbers]) == {"val/frechet_lite0_12": pytest.approx(expected, rel=1e-9)}
    assert expected > 1


def test_inception_is_taken_where_its_weights_are(empty_cache: Path, inception_weights: Path) -> None:
    (empty_cache / CACHED_NAMES[1]).symlink_to(inception_weights)
    name, extractor = find_extractor(torch.device("cpu"), "experiment.eval_samples")
    assert name == "fid"
    assert extractor.pool_dim == 2048


def test_no_back_end_is_one_line(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"experiment\.eval_samples: expected Inception weights or the package effic"):
        find_extractor(torch.device("cpu"), "experiment.eval_samples")


def compute_on_rank(output: Path) -> None:
    with init_distributed() as ctx:
        (output / f"{ctx.rank}.json").write_text(json.dumps(stub_distance(ctx)))


@pytest.mark.multiprocess
def test_two_processes_share_the_same_batches(alone: DistributedContext, tmp_path: Path) -> None:
    metrics, asked = stub_distance(alone)
    assert asked == [list(range(5)), list(range(5, 10)), [10, 11]]
    run_ranks(compute_on_rank, tmp_path, processes=2)
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert of_ranks[0][1] + of_ranks[1][1] == asked
    assert of_ranks[0][0] == of_ranks[1][0] == pytest.approx(metrics, rel=1e-9)


def test_a_model_without_finite_numbers_has_no_distance(
    alone: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_distance, "find_extractor", lambda device, needed_by: ("fid", StubExtractor()))
    distance = SampleDistance(ImagesInMemory(images()[0]), 4, 2, alone)

    def generate(numbers: list[int]) -> np.ndarray:
        raise NonFiniteError("logits")

    assert np.isnan(distance(generate)["val/fid_4"])
    assert distance(lambda numbers: images()[1][numbers])["val/fid_4"] > 0
    with pytest.raises(InputError, match=r"experiment\.eval_samples=4: found 1 validation images, expected at least 2"):
        SampleDistance(ImagesInMemory(images()[0][:1]), 4, 2, alone)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["experiment.eval_samples=1"], r"experiment\.eval_samples=1: expected 0 or at least 2"),
        (["experiment.eval_samples=8", "experiment.eval_every=0"], r"eval_samples=8: expected experiment\.eval_every"),
        (["experiment.eval_samples=8"], r"eval_samples=8: expected .*dataset\.params\.eval_shards_path_or_url"),
    ],
)
def test_samples_that_cannot_be_compared_are_one_line(tiny_arguments: list[str], more: list[str], message: str) -> None:
    images = ["dataset.params.eval_shards_path_or_url=images"] if len(more) > 1 else []
    config = load_config([*tiny_arguments, "experiment.output_dir=unused", "experiment.eval_every=5", *more, *images])
    with pytest.raises(InputError, match=message):
        check_training(config)
