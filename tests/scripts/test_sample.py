"""The sampler: any number of processes and images, the same npz."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.rear import ReAR
from scripts import sample_imagenet_rear
from utils.checkpoint import save_weights
from utils.config import load_config
from utils.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, projectors included, as the trainer and the published files have them."""
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    torch.manual_seed(0)
    model = ReAR(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(model.state_dict(), path)
    return path


def arguments_of(tiny_arguments: list[str], checkpoint: Path, output: Path, *overrides: str) -> list[str]:
    return [
        *tiny_arguments,
        f"experiment.output_dir={output}",
        f"experiment.generator_checkpoint={checkpoint}",
        *overrides,
    ]


def sample(tiny_arguments: list[str], checkpoint: Path, output: Path, *overrides: str) -> Path:
    sample_imagenet_rear.main(load_config(arguments_of(tiny_arguments, checkpoint, output, *overrides)))
    return output.with_name(output.name + ".npz")


def torchrun(tiny_arguments: list[str], checkpoint: Path, output: Path, *overrides: str, processes: int) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "scripts/sample_imagenet_rear.py")]
    command += arguments_of(tiny_arguments, checkpoint, output, *overrides)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output.with_name(output.name + ".npz")


@pytest.fixture(scope="module")
def npz(tiny_arguments: list[str], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tiny_arguments, checkpoint, tmp_path_factory.mktemp("reference") / "samples")


def test_npz_has_what_the_adm_evaluator_reads(npz: Path) -> None:
    arrays = np.load(npz)
    assert arrays["arr_0"].shape == (37, 16, 16, 3)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [i % 5 for i in range(37)]
    assert len(np.unique(arrays["arr_0"], axis=0)) > 30
    assert sorted(path.name for path in npz.parent.iterdir()) == ["samples.npz", "samples.png", "samples.yaml"]
    assert Image.open(npz.parent / "samples.png").size[0] >= 10 * 16


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batch_size_changes_nothing(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path, batch_size: int
) -> None:
    other = sample(tiny_arguments, checkpoint, tmp_path / "x", f"sampling.per_gpu_batch_size={batch_size}")
    assert other.read_bytes() == npz.read_bytes()


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
def test_number_of_processes_changes_nothing(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path, processes: int
) -> None:
    assert torchrun(tiny_arguments, checkpoint, tmp_path / "x", processes=processes).read_bytes() == npz.read_bytes()


def test_a_seed_or_a_class_more_changes_the_images(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path
) -> None:
    other = sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.seed=1")
    assert not np.array_equal(np.load(other)["arr_0"], np.load(npz)["arr_0"])


def test_fewer_images_are_the_first_ones(
    tiny_arguments: list[str], checkpoint: Path, npz: Path, tmp_path: Path
) -> None:
    other = sample(tiny_arguments, checkpoint, tmp_path / "x", "sampling.num_fid_samples=3")
    assert np.array_equal(np.load(other)["arr_0"], np.load(npz)["arr_0"][:3])


def test_missing_and_foreign_weights_are_named(tiny_arguments: list[str], checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"generator_checkpoint: missing"):
        sample_imagenet_rear.main(load_config([*tiny_arguments, f"experiment.output_dir={tmp_path / 'x'}"]))
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        sample(tiny_arguments, tmp_path / "absent.safetensors", tmp_path / "x")
    with pytest.raises(InputError, match=r"model\.safetensors.*blocks\.2"):
        sample(tiny_arguments, checkpoint, tmp_path / "x", "model.generator.num_hidden_layers=3")
    assert list(tmp_path.iterdir()) == []
