"""Pre-tokenization against encoding image by image, and its errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from data.token_store import open_tokens
from data.transforms import ten_crop
from modeling.maskgit_vq import load_tokenizer
from scripts import pretokenize
from utils.config import load_config
from utils.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes with three noise images each, 24 x 20 pixels."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def arguments(tiny_arguments: list[str], images: Path, output: Path, *more: str) -> list[str]:
    return [
        *tiny_arguments,
        f"experiment.output_dir={output.parent / 'unused'}",
        f"dataset.params.train_shards_path_or_url={images}",
        f"dataset.params.pretokenization={output}",
        *more,
    ]


@pytest.mark.parametrize("batch_size", [1, 32])
def test_codes_are_those_of_the_crops_in_order(
    tiny_arguments: list[str], images: Path, tmp_path: Path, batch_size: int
) -> None:
    output = tmp_path / "codes.jsonl"
    config = load_config(arguments(tiny_arguments, images, output, f"training.per_gpu_batch_size={batch_size}"))
    pretokenize.main(config)
    store_file = tmp_path / "codes.tokens/tokens.npy"
    converted = store_file.stat().st_ino
    store = open_tokens(output, codebook_size=24, image_seq_len=16, num_classes=5)
    assert store_file.stat().st_ino == converted  # the store beside the jsonl is up to date
    assert len(output.read_text().splitlines()) == len(store) == 60
    assert store.class_ids.tolist() == [0] * 30 + [1] * 30
    assert store.meta.class_names == ["cat", "dog"]
    assert store.meta.crops_per_image == 10
    tokenizer = load_tokenizer(config)
    expected = []
    for path in sorted(images.rglob("*.png")):
        for crop in ten_crop(Image.open(path), 16):
            expected.append(tokenizer.encode(F.to_tensor(crop)[None])[0])
    np.testing.assert_array_equal(store.codes, torch.stack(expected))


def test_only_a_store(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes.tokens"
    pretokenize.main(
        load_config(arguments(tiny_arguments, images, output, "dataset.preprocessing.pretokenize_crops=center_flip"))
    )
    assert len(open_tokens(output, 24, 16, 5)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.tokens", "images"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.params.train_shards_path_or_url=null", "train_shards_path_or_url: missing"),
        ("dataset.params.pretokenization=null", "pretokenization: missing"),
        ("dataset.params.pretokenization=codes.npz", "ends in .jsonl or .tokens"),
        ("dataset.preprocessing.crop_size=8", "crop_size=8: expected model.vq_model.resolution=16"),
        ("model.generator.condition_num_classes=1", "dog/0.png: found class id 1, expected less than 1"),
    ],
)
def test_wrong_configs(tiny_arguments: list[str], images: Path, tmp_path: Path, override: str, message: str) -> None:
    config = load_config(arguments(tiny_arguments, images, tmp_path / "codes.tokens", override))
    with pytest.raises(InputError, match=message) as error:
        pretokenize.main(config)
    assert "\n" not in str(error.value)


def test_bad_image_leaves_no_store(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    (images / "dog/1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"dog/1\.png"):
        pretokenize.main(load_config(arguments(tiny_arguments, images, tmp_path / "codes.jsonl")))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_typo_ends_before_the_slow_imports(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/pretokenize.py", "dataset.params.pretokenisation=a.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean" in result.stderr
    assert len(result.stderr.splitlines()) == 1
