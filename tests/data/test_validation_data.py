"""Validation data: codes and images, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import validation_data
from data.codes.store_files import StoreMeta
from data.codes.token_store import TokenStore
from data.codes.token_writer import new_token_store
from data.images.reading import ImageDataset
from data.validation_data import (
    ValidationPixels,
    open_validation_data,
    open_validation_images,
    validation_batches,
)
from evaluation.validator import ValidationTokens
from modeling.loading import load_tokenizer
from scripts import pretokenize
from tests.conftest import make_noise_images
from utils.config import load_config
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.schema import Config

ALONE = DistributedContext(0, 1, torch.device("cpu"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_noise_images(tmp_path / "images", 5, 20, 24)


@pytest.fixture
def codes(tiny_config_file: Path) -> str:
    return f"dataset.params.eval_pretokenization={tiny_config_file.parent / 'codes.jsonl'}"


def load(arguments: list[str], *more: str) -> Config:
    return load_config([*arguments, "experiment.output_dir=unused", "experiment.eval_every=1", *more])


def of_images(images: Path) -> str:
    return f"dataset.params.eval_shards_path_or_url={images}"


def pretokenized(arguments: list[str], images: Path, *more: str) -> Path:
    store = images.with_name("heldout.tokens")
    of_store = [f"dataset.params.train_shards_path_or_url={images}", f"dataset.params.pretokenization={store}"]
    pretokenize.main(load(arguments, *of_store, "dataset.preprocessing.pretokenize_crops=center", *more))
    return store


def read(config: Config) -> ValidationTokens:
    tokenizer = load_tokenizer(config)
    dataset = open_validation_data(config, tokenizer.sha256())
    assert dataset is not None
    return ValidationTokens.gather(validation_batches(dataset, config, ALONE), len(dataset), tokenizer, ALONE)


def test_none_where_none_is_asked_for(tiny_arguments: list[str], images: Path, codes: str) -> None:
    assert open_validation_data(load(tiny_arguments), "") is None
    assert open_validation_data(load(tiny_arguments, codes, of_images(images), "experiment.eval_every=0"), "") is None
    assert isinstance(open_validation_data(load(tiny_arguments, of_images(images)), ""), ImageDataset)
    assert isinstance(open_validation_data(load(tiny_arguments, codes, of_images(images)), ""), TokenStore)


@pytest.mark.parametrize("broken", [False, True])
def test_images_give_the_codes_that_pretokenizing_gives(
    tiny_arguments: list[str], images: Path, capsys: pytest.CaptureFixture, broken: bool
) -> None:
    more = ["training.per_gpu_batch_size=4", "dataset.params.on_bad_sample=skip", "dataset.params.max_bad_fraction=0.1"]
    if broken:
        (images / "cat/3.png").write_bytes(b"broken")
    config = load(tiny_arguments, of_images(images), *more, "dataset.preprocessing.random_crop=true")
    found = read(config)
    assert ("cat/3.png: cannot be decoded" in capsys.readouterr().err) == broken
    store = pretokenized(tiny_arguments, images, *more)
    np.testing.assert_array_equal(found.codes, TokenStore(store).codes)
    np.testing.assert_array_equal(found.class_labels, TokenStore(store).class_ids)
    of_store = read(load(tiny_arguments, f"dataset.params.eval_pretokenization={store}", *more))
    for name, values in vars(found).items():
        assert torch.equal(getattr(of_store, name), values)


def test_too_many_unreadable_images_end_the_run(tiny_arguments: list[str], images: Path) -> None:
    for i in range(2):
        (images / f"cat/{i}.png").write_bytes(b"broken")
    skip = ["dataset.params.on_bad_sample=skip", "dataset.params.max_bad_fraction=0.1"]
    with pytest.raises(InputError, match=r"2 of 10 images cannot be decoded, expected at most .*max_bad_fraction=0\.1"):
        read(load(tiny_arguments, of_images(images), *skip))
    with pytest.raises(InputError, match=r"cat/0\.png: cannot decode the image"):
        read(load(tiny_arguments, of_images(images)))


def test_labels_are_those_of_training(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    for name in ("ant", "cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    training = f"dataset.params.train_shards_path_or_url={tmp_path / 'train'}"
    assert read(load(tiny_arguments, of_images(images), training)).class_labels.tolist() == [1] * 5 + [2] * 5
    store = f"dataset.params.eval_pretokenization={pretokenized(tiny_arguments, images)}"
    message = r"dataset\.params\.eval_pretokenization: found other class names in .*heldout\.tokens than in .*train, "
    with pytest.raises(InputError, match=message):
        open_validation_data(load(tiny_arguments, store, training), load_tokenizer(load(tiny_arguments)).sha256())


def test_an_id_is_checked_after_it_is_that_of_training(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    """Not before: the null class has the first id that is too large."""
    for names, message in ((["cat", "dog"], None), (["cat", "dune", "dog"], r"dog/0\.png: found class id 2, expected")):
        store = tmp_path / f"{len(names)}.tokens"
        with new_token_store(store, StoreMeta(image_seq_len=16, codebook_size=24, class_names=names)) as writer:
            writer.append(np.ones((1, 16), np.int64), np.zeros(1, np.int64))
        config = load(tiny_arguments, of_images(images), f"dataset.params.pretokenization={store}")
        if message is None:
            assert open_validation_images(config, 2).class_ids.tolist() == [0] * 5 + [1] * 5
            assert open_validation_images(config, 3, ["dog", "x", "cat"]).class_ids.tolist() == [2] * 5 + [0] * 5
        else:
            with pytest.raises(InputError, match=message):
                open_validation_images(config, 2)


def test_what_does_not_fit_is_named(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    missing = f"dataset.params.eval_pretokenization={tmp_path / 'missing.jsonl'}"
    with pytest.raises(InputError, match=r"^dataset\.params\.eval_pretokenization=.*missing\.jsonl: no such file$"):
        open_validation_data(load(tiny_arguments, missing), "")
    store = f"dataset.params.eval_pretokenization={pretokenized(tiny_arguments, images)}"
    with pytest.raises(InputError, match=r"^\S*heldout\.tokens: made by a tokenizer of sha256 .*, abc\.\.\.$"):
        open_validation_data(load(tiny_arguments, store), "abc")
    with pytest.raises(InputError, match=r"dog/0\.png: found class id 1, expected less than 1 \(num_classes\)"):
        open_validation_data(load(tiny_arguments, of_images(images), "model.generator.condition_num_classes=1"), "")


def test_hashes_are_verified_if_asked_for(tiny_arguments: list[str], images: Path) -> None:
    path = pretokenized(tiny_arguments, images)
    array = np.load(path / "tokens.npy")
    array[0, 0] ^= 1
    np.save(path / "tokens.npy", array)
    store, sha256 = f"dataset.params.eval_pretokenization={path}", load_tokenizer(load(tiny_arguments)).sha256()
    assert open_validation_data(load(tiny_arguments, store), sha256) is not None
    with pytest.raises(InputError, match=r"tokens\.npy: found sha256"):
        open_validation_data(load(tiny_arguments, store, "dataset.params.verify_hashes=true"), sha256)


def test_pixels_are_the_bytes_of_the_crops(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_noise_images(tmp_path / "small", 5, 16, 16)
    files = np.stack([np.asarray(Image.open(path)) for path in sorted(images.glob("*/*.png"))])
    pixels = ValidationPixels(load(tiny_arguments, of_images(images)))
    assert len(pixels) == 10
    np.testing.assert_array_equal(pixels.read(2, 7), files[2:7])
    monkeypatch.setattr(validation_data, "MAX_IMAGES", 4)
    some = ValidationPixels(load(tiny_arguments, of_images(images)))
    np.testing.assert_array_equal(some.read(0, len(some)), files[[0, 2, 5, 7]])
