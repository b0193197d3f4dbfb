"""Stored codes together with their images: the same crops, or one line about what differs."""

import json
from pathlib import Path

import pytest
import torch

from data.codes.token_store import TokenStore
from data.codes_and_images import CodesAndImages
from data.loading import Batches
from data.training_batches import open_training_data
from modeling.loading import load_tokenizer
from scripts import pretokenize
from tests.conftest import make_noise_images
from utils.config import load_config
from utils.errors import InputError
from utils.images import to_float
from utils.schema import Config


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_noise_images(tmp_path / "images", 3, 20, 24)


def load(arguments: list[str], images: Path, *more: str) -> Config:
    data = [f"dataset.params.train_shards_path_or_url={images}"]
    data.append(f"dataset.params.pretokenization={images.with_name('train.tokens')}")
    return load_config([*arguments, "experiment.output_dir=unused", *data, *more])


def open_pairs(config: Config) -> CodesAndImages:
    dataset = open_training_data(config, load_tokenizer(config).sha256(), verify=True, need_images=["repa"])
    assert isinstance(dataset, CodesAndImages)
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("crops", "number"), [("center", 1), ("center_flip", 2), ("ten_crop", 10)])
def test_a_sample_has_the_pixels_of_its_codes(
    tiny_arguments: list[str], images: Path, crops: str, number: int, workers: int
) -> None:
    config = load(tiny_arguments, images, f"dataset.preprocessing.pretokenize_crops={crops}")
    pretokenize.main(config)
    dataset, tokenizer = open_pairs(config), load_tokenizer(config)
    assert len(dataset) == 6 * number
    items = [list(range(0, len(dataset), 2)), [1, 0, len(dataset) - 1]]
    for batch, indices in zip(Batches(dataset, items, workers), items, strict=True):
        assert batch["index"].tolist() == indices
        assert batch["image"].shape == (len(indices), 16, 16, 3)
        assert torch.equal(tokenizer.encode(to_float(batch["image"])), batch["codes"])
        assert torch.equal(batch["class_labels"], torch.tensor(indices) // (3 * number))


def test_codes_alone_without_a_tap_that_needs_images(tiny_arguments: list[str], images: Path) -> None:
    config = load(tiny_arguments, images)
    pretokenize.main(config)
    dataset = open_training_data(config, load_tokenizer(config).sha256(), verify=False)
    assert isinstance(dataset, TokenStore)
    assert "image" not in dataset.__getitems__([0])


def test_what_does_not_belong_together_is_one_line(
    tiny_arguments: list[str], images: Path, tiny_config_file: Path
) -> None:
    pretokenize.main(load(tiny_arguments, images))
    fingerprint = open_pairs(load(tiny_arguments, images)).fingerprint
    for more, message in (
        (["dataset.params.train_shards_path_or_url=null"], "missing; the tap 'repa' of model.generator.taps needs the"),
        (["dataset.preprocessing.pretokenize_crops=center"], "made with other crops: dataset.preprocessing.pretokeniz"),
        (["dataset.preprocessing.background=black"], "other crops: dataset.preprocessing.background: found None, exp"),
        (
            [f"dataset.params.pretokenization={tiny_config_file.parent / 'codes.jsonl'}"],
            "found no record of the images of these codes, expected a store of scripts/pretokenize.py",
        ),
    ):
        with pytest.raises(InputError, match=message):
            open_pairs(load(tiny_arguments, images, *more))
    (images / "cat/0.png").rename(images / "cat/00.png")
    with pytest.raises(InputError, match=r"train\.tokens: made from images with other keys or classes than those of"):
        open_pairs(load(tiny_arguments, images))
    (images / "cat/00.png").rename(images / "cat/0.png")
    assert open_pairs(load(tiny_arguments, images)).fingerprint == fingerprint
    (images / "cat/0.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"cat/0\.png: cannot decode"):
        open_pairs(load(tiny_arguments, images)).__getitems__([0])
    meta = images.with_name("train.tokens") / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"num_skipped": 1}))
    with pytest.raises(InputError, match="found codes without 1 unreadable images"):
        open_pairs(load(tiny_arguments, images))
