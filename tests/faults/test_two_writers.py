"""Two commands at the same time in one folder: one goes on, the other names it; the result is that of one alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling.rear import ReAR
from tests.faults.runs import WAIT_S, launch_environment
from utils.config import load_config
from utils.files.weights import save_weights

ROOT = Path(__file__).parents[2]
RESULTS = {"train": "out/model.safetensors", "sample": "out.npz", "convert": "out.tokens/tokens.npy"}
RESULTS["pretokenize"] = "out.tokens/tokens.npy"


def command_of(kind: str, arguments: list[str], images: Path, weights: Path, folder: Path) -> list[str]:
    """A script whose result is `folder / RESULTS[kind]`."""
    output, project = f"experiment.output_dir={folder / 'out'}", Path(arguments[0].removeprefix("config=")).parent
    sizes = ["--codebook-size", "24", "--image-seq-len", "16", "--num-classes", "5", "--processes", "1"]
    return {
        "train": ["train_rear.py", *arguments, output, "training.max_train_steps=3"],
        "sample": ["sample_imagenet_rear.py", *arguments, output, f"experiment.generator_checkpoint={weights}"],
        "convert": ["convert_tokens.py", str(project / "codes.jsonl"), str(folder / "out.tokens"), *sizes],
        "pretokenize": [
            "pretokenize.py",
            *arguments,
            f"dataset.params.train_shards_path_or_url={images}",
            f"dataset.params.pretokenization={folder / 'out.tokens'}",
        ],
    }[kind]


def start(command: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT / "scripts", env=launch_environment(), **pipes)


def rounds(kind: str, number: int, arguments: list[str], images: Path, folder: Path) -> None:
    weights = folder / "weights.safetensors"
    torch.manual_seed(0)
    save_weights(ReAR(load_config([*arguments, "experiment.output_dir=x"]).model).state_dict(), weights)
    results = set()
    for i in range(number + 1):
        place = folder / str(i)
        place.mkdir()
        processes = [start(command_of(kind, arguments, images, weights, place)) for _ in range(2 if i else 1)]
        errors = [process.communicate(timeout=WAIT_S)[1] for process in processes]
        codes = [process.returncode for process in processes]
        refused = [error for error, code in zip(errors, codes, strict=True) if code]
        assert 0 in codes, errors
        for error in refused:
            owner = processes[codes.index(0)].pid
            last = error.strip().splitlines()[-1]
            assert re.search(rf"^error: .*in use by \w+\.py, process {owner} on \S+, since \d{{4}}-", last), error
        results.add((place / RESULTS[kind]).read_bytes())
    assert len(results) == 1
    killed = start(command := command_of(kind, arguments, images, weights, place := folder / "killed"))
    lock = {"train": "out/.lock", "sample": "out.lock"}.get(kind, "out.tokens.lock")
    while not (place / lock).exists() and killed.poll() is None:
        pass
    killed.kill()
    killed.communicate()
    again = start(command)
    _, error = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, error
    assert {(place / RESULTS[kind]).read_bytes()} == results


@pytest.fixture
def images(tmp_path: Path) -> Path:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"images/{name}/{i}.png")
    return tmp_path / "images"


@pytest.mark.multiprocess
def test_two_conversions(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    rounds("convert", 2, tiny_arguments, images, tmp_path)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", RESULTS)
def test_twenty_rounds(kind: str, tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    rounds(kind, 20, tiny_arguments, images, tmp_path)
