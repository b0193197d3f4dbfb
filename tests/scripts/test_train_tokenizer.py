"""Training and evaluating a tiny tokenizer on a few made-up images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.tokenizers.maskgit_vq import MaskGitVQ
from modeling.tokenizers.registry import load_tokenizer
from scripts import train_tokenizer
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import load_state_dict
from utils.run.tracking import read_metrics


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 12 and 4 images, each of one colour with a brighter half."""
    rng = np.random.default_rng(0)
    for name, count in (("cat", 12), ("dog", 4)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.broadcast_to(rng.integers(0, 200, 3, dtype=np.uint8), (16, 16, 3)).copy()
            pixels[:, :8] += 50
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i:02d}.png")
    return tmp_path / "images"


def arguments(tiny_arguments: list[str], images: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *tiny_arguments,
        f"experiment.output_dir={output_dir}",
        f"dataset.params.train_shards_path_or_url={images}",
        f"dataset.params.eval_shards_path_or_url={images}",
        "optimizer.params.learning_rate=5e-3",
        "lr_scheduler.params.learning_rate=5e-3",
        "vq_training.revive_every=4",
        "training.max_train_steps=30",
        *more,
    ]


def test_training_run(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = load_config(arguments(tiny_arguments, images, run))
    train_tokenizer.main(config)
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["train/l1"] for row in rows if "train/l1" in row]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert [row["step"] for row in rows if "revived_codes" in row] == list(range(4, 30, 4))

    figures = json.loads((run / "metrics.json").read_text())
    assert (figures["step"], figures["images"]) == (30, 16)
    assert figures["psnr"] > 10
    assert load_config([f"config={run / 'config.yaml'}"]) == config
    assert Image.open(run / "reconstructions.png").size == (16 * 18 - 2, 2 * 18 - 2)
    weights = load_state_dict(run / "tokenizer.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    config.experiment.tokenizer_checkpoint = str(run / "tokenizer.safetensors")
    assert load_tokenizer(config).codebook_size == 24


def test_training_goes_on_from_given_weights(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train_tokenizer.main(load_config(arguments(tiny_arguments, images, first)))
    more = [f"vq_training.init_from={first / 'tokenizer.safetensors'}", "training.max_train_steps=1"]
    train_tokenizer.main(load_config(arguments(tiny_arguments, images, tmp_path / "second", *more)))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("first", "second")]
    assert rows[1][0]["train/l1"] < 0.7 * rows[0][0]["train/l1"]
    absent = arguments(tiny_arguments, images, tmp_path / "third", "vq_training.init_from=absent.safetensors")
    with pytest.raises(InputError, match=r"absent\.safetensors: no such weights file"):
        train_tokenizer.main(load_config(absent))


def test_same_seed_same_weights(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        train_tokenizer.main(
            load_config(arguments(tiny_arguments, images, tmp_path / name, "training.max_train_steps=3"))
        )
        weights.append((tmp_path / name / "tokenizer.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_adversarial_training(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    """The discriminator learns, its judgement enters the tokenizer's loss, and its weights are not exported."""
    weight = ["vq_training.adversarial_weight=0.5", "training.max_train_steps=20"]
    train_tokenizer.main(load_config(arguments(tiny_arguments, images, tmp_path / "run", *weight)))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert rows[0]["train/discriminator"] == pytest.approx(1, abs=0.2)
    assert rows[-1]["train/discriminator"] < 0.9 * rows[0]["train/discriminator"]
    assert not any("heads" in key for key in load_state_dict(tmp_path / "run" / "tokenizer.safetensors"))
    plain = arguments(tiny_arguments, images, tmp_path / "plain", "training.max_train_steps=1")
    train_tokenizer.main(load_config(plain))
    without = read_metrics(tmp_path / "plain" / "metrics.jsonl")[0]
    assert "train/generator" not in without
    assert rows[0]["train/loss"] == pytest.approx(without["train/loss"] + 0.5 * rows[0]["train/generator"], rel=1e-5)


def test_replaced_codes_are_features(tiny_arguments: list[str], images: Path) -> None:
    config = load_config(arguments(tiny_arguments, images, Path("unused")))
    tokenizer = MaskGitVQ(config.model.vq_model)
    before = tokenizer.quantize.embedding.weight.detach().clone()
    batch = torch.rand(4, 3, 16, 16)
    codes = torch.tensor([3, 20])
    train_tokenizer.replace_codes(tokenizer, codes, batch)
    after = tokenizer.quantize.embedding.weight.detach()
    changed = (after != before).any(dim=1).nonzero()[:, 0]
    assert torch.equal(changed, codes)
    features = tokenizer.encoder(batch).permute(0, 2, 3, 1).reshape(-1, 8)
    assert torch.cdist(after[codes], features).min(dim=1).values.max() < 1e-3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("dataset.preprocessing.crop_size=8", "crop_size=8: expected model.vq_model.resolution=16"),
        ("dataset.params.train_shards_path_or_url=null", "train_shards_path_or_url: missing"),
        ("dataset.params.eval_shards_path_or_url=null", "eval_shards_path_or_url: missing"),
    ],
)
def test_input_errors(tiny_arguments: list[str], images: Path, tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_tokenizer.main(load_config(arguments(tiny_arguments, images, tmp_path / "run", argument)))
    assert not (tmp_path / "run").exists()
