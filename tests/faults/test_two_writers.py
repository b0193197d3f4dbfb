"""Two commands at the same time in one folder: one continues, the other names it; the result is that of one alone."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from modeling.rear import ReAR
from tests.conftest import make_noise_images
from tests.processes import WAIT_S, start_script
from utils.config import load_config
from utils.files.weights import save_weights

RESULTS = {"train": "out/model.safetensors", "sample": "out.npz", "convert": "out.tokens/tokens.npy"}
RESULTS["pretokenize"] = "out.tokens/tokens.npy"


def command_of(kind: str, arguments: list[str], images: Path, weights: Path, folder: Path) -> list[str]:
    """A script whose result is `folder / RESULTS[kind]`."""
    output, project = f"experiment.output_dir={folder / 'out'}", Path(arguments[0].removeprefix("config=")).parent
    sizes = ["--codebook-size", "24", "--image-seq-len", "16", "--num-classes", "5", "--processes", "1"]
    return {
        "train": ["scripts/train_rear.py", *arguments, output, "training.max_train_steps=3"],
        "sample": ["scripts/sample_imagenet_rear.py", *arguments, output, f"experiment.generator_checkpoint={weights}"],
        "convert": ["scripts/convert_tokens.py", str(project / "codes.jsonl"), str(folder / "out.tokens"), *sizes],
        "pretokenize": [
            "scripts/pretokenize.py",
            *arguments,
            f"dataset.params.train_shards_path_or_url={images}",
            f"dataset.params.pretokenization={folder / 'out.tokens'}",
        ],
    }[kind]


def errors_of(output: Path) -> str:
    return Path(f"{output}.err").read_text()


def content(result: Path) -> bytes:
    """Of weights only the tensors: their metadata has the hash of the config, which names the folder."""
    return save(load_file(result)) if result.suffix == ".safetensors" else result.read_bytes()


def rounds(kind: str, number: int, arguments: list[str], images: Path, folder: Path) -> None:
    weights = folder / "weights.safetensors"
    torch.manual_seed(0)
    save_weights(ReAR(load_config([*arguments, "experiment.output_dir=x"]).model).state_dict(), weights)
    results = set()
    for i in range(number + 1):
        place = folder / str(i)
        place.mkdir()
        outputs = [place / f"output{k}" for k in range(2 if i else 1)]
        processes = [start_script(command_of(kind, arguments, images, weights, place), output) for output in outputs]
        for process in processes:
            process.join(WAIT_S)
        codes, errors = [process.exitcode for process in processes], list(map(errors_of, outputs))
        refused = [error for error, code in zip(errors, codes, strict=True) if code]
        assert 0 in codes, errors
        for error in refused:
            owner = processes[codes.index(0)].pid
            last = error.strip().splitlines()[-1]
            assert re.search(rf"^error: .*/out\S*: .*process {owner} on \S+;", last), error
        results.add(content(place / RESULTS[kind]))
    assert len(results) == 1
    command, output = command_of(kind, arguments, images, weights, place := folder / "killed"), folder / "output"
    killed = start_script(command, output)
    lock = {"train": "out/.lock", "sample": "out.lock"}.get(kind, "out.tokens.lock")
    while not (place / lock).exists() and killed.is_alive():
        pass
    killed.kill()
    killed.join()
    again = start_script(command, output)
    again.join(WAIT_S)
    assert again.exitcode == 0, errors_of(output)
    assert {content(place / RESULTS[kind])} == results


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_noise_images(tmp_path / "images", 4, 16, 16)


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", RESULTS)
def test_two_at_the_same_time(kind: str, tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    rounds(kind, 1, tiny_arguments, images, tmp_path)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", RESULTS)
def test_twenty_rounds(kind: str, tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    rounds(kind, 20, tiny_arguments, images, tmp_path)
