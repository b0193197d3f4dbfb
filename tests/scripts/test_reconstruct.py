"""Reconstruction files against encoding and decoding image by image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.loading import load_tokenizer
from scripts import reconstruct
from utils.config import load_config
from utils.errors import InputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 5 and 2 noise images, 16 x 16 pixels."""
    rng = np.random.default_rng(0)
    for name, count in (("cat", 5), ("dog", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def run(tiny_arguments: list[str], images: Path, output_dir: Path, *more: str) -> dict[str, np.ndarray]:
    location = [f"experiment.output_dir={output_dir}", f"dataset.params.eval_shards_path_or_url={images}"]
    config = load_config([*tiny_arguments, *location, *more])
    reconstruct.main(config)
    arrays = {}
    for name in ("reference", "reconstructions"):
        with np.load(output_dir / f"{name}.npz") as file:
            arrays |= {name: file["arr_0"], f"{name}_labels": file["arr_1"]}
    return arrays


@pytest.mark.parametrize("batch_size", [2, 8])
def test_files(tiny_arguments: list[str], images: Path, tmp_path: Path, batch_size: int) -> None:
    arrays = run(tiny_arguments, images, tmp_path / "out", f"sampling.per_gpu_batch_size={batch_size}")
    for name in ("reference", "reconstructions"):
        assert arrays[name].dtype == np.uint8
        assert arrays[name].shape == (7, 16, 16, 3)
        assert arrays[f"{name}_labels"].dtype == np.int64
        assert arrays[f"{name}_labels"].tolist() == [0, 1, 0, 1, 0, 0, 0]  # the classes take turns
    originals = {np.asarray(Image.open(path)).tobytes() for path in images.glob("*/*.png")}
    assert {image.tobytes() for image in arrays["reference"]} == originals

    tokenizer = load_tokenizer(load_config([*tiny_arguments, "experiment.output_dir=unused"]))
    pixels = torch.from_numpy(arrays["reference"]).permute(0, 3, 1, 2) / 255
    decoded = tokenizer.decode(tokenizer.encode(pixels))
    wanted = (decoded * 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert np.abs(arrays["reconstructions"].astype(int) - wanted).max() <= 1

    figures = json.loads((tmp_path / "out/reconstruct.json").read_text())
    difference = (decoded - pixels).double()
    assert figures["images"] == 7
    assert figures["crop"] == "ADM centre crop of 16 px, shorter edge 16 px"
    assert figures["l1"] == pytest.approx(difference.abs().mean().item(), rel=1e-4)
    psnr = -10 * difference.square().mean(dim=(1, 2, 3)).log10()
    assert figures["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
    codes, counts = tokenizer.encode(pixels).unique(return_counts=True)
    assert figures["codebook_used"] == pytest.approx(len(codes) / 24)
    shares = counts.double() / counts.sum()
    assert figures["codebook_perplexity"] == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-4)
    assert Image.open(tmp_path / "out/reconstructions.png").size == (7 * 18 - 2, 2 * 18 - 2)


def test_first_images_only(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    everything = run(tiny_arguments, images, tmp_path / "all")
    first = run(tiny_arguments, images, tmp_path / "first", "sampling.num_fid_samples=4")
    for name, array in first.items():
        np.testing.assert_array_equal(array, everything[name][:4])


def test_classes_are_interleaved() -> None:
    class_ids = np.repeat([0, 1, 2], [40, 50, 30]).astype(np.int32)
    shuffled = np.random.default_rng(0).permutation(120)
    order = reconstruct.interleave_classes(shuffled, class_ids)
    assert sorted(order) == list(range(120))
    assert class_ids[order][:90].tolist() == [0, 1, 2] * 30
    for class_id in range(3):
        assert order[class_ids[order] == class_id].tolist() == shuffled[class_ids[shuffled] == class_id].tolist()


def test_missing_images(tiny_arguments: list[str], tmp_path: Path) -> None:
    config = load_config([*tiny_arguments, f"experiment.output_dir={tmp_path / 'out'}"])
    with pytest.raises(InputError, match="eval_shards_path_or_url: missing"):
        reconstruct.main(config)
    assert not (tmp_path / "out").exists()


def test_skip_leaves_bad_images_out(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    (images / "cat/0.png").write_bytes(b"broken")
    skip = ["dataset.params.on_bad_sample=skip", "dataset.params.max_bad_fraction=0.2"]
    arrays = run(tiny_arguments, images, tmp_path / "out", *skip)
    assert arrays["reference_labels"].tolist() == [0, 1, 0, 1, 0, 0]
    assert len({image.tobytes() for image in arrays["reference"]}) == 6
    with pytest.raises(InputError, match="cannot be decoded, expected at most"):
        run(tiny_arguments, images, tmp_path / "out", skip[0])


def test_labels_are_those_of_training(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    for name in ("ant", "cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    training = f"dataset.params.train_shards_path_or_url={tmp_path / 'train'}"
    arrays = run(tiny_arguments, images, tmp_path / "out", training)
    assert arrays["reference_labels"].tolist() == [1, 2, 1, 2, 1, 1, 1]
    (tmp_path / "train/dog").rmdir()
    with pytest.raises(InputError, match=r"found 1 class names that .*train lacks or has twice, such as 'dog'"):
        run(tiny_arguments, images, tmp_path / "out", training)


def test_other_images_are_not_replaced(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    before = run(tiny_arguments, images, tmp_path / "out")
    again = run(tiny_arguments, images, tmp_path / "out", "sampling.per_gpu_batch_size=3")
    with pytest.raises(InputError, match=r"reference.npz: .*sampling.seed: found 42, expected 1;"):
        run(tiny_arguments, images, tmp_path / "out", "sampling.seed=1")
    for name, array in before.items():
        np.testing.assert_array_equal(again[name], array)
    assert json.loads((tmp_path / "out/reconstruct.json").read_text())["psnr"] > 0
