"""The benchmark of tokenizer training: what each choice changes, its tables, and its speed next to convolutions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import benchmark, train_tokenizer
from scripts.benchmarks import tokenizer
from utils.errors import InputError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a small recipe on ten images of noise."""
    rng = np.random.default_rng(0)
    (tmp_path / "images/one").mkdir(parents=True)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"images/one/{i}.png")
    text = tokenizer.OWN_TOKENIZER.read_text()
    for old, new in (("codebook_size: 512", "codebook_size: 16"), ("resolution: 32", "resolution: 8")):
        assert old in text
        text = text.replace(old, new)
    images = tmp_path / "images"
    text = text.replace("params:\n    num", f"params:\n    train_shards_path_or_url: {images}\n    num", 1)
    text = text.replace("params:\n    train", f"params:\n    eval_shards_path_or_url: {images}\n    train", 1)
    (tmp_path / "tokenizer.yaml").write_text(text)
    return tmp_path / "tokenizer.yaml"


def test_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["tokenizer", str(config), "--steps", "2", "--choices", "the recipe"])
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [row["choice"] for row in rows] == ["k-means of patches", "the recipe"]
    assert all(row["psnr"] > 5 for row in rows)
    assert f"| {config} | the recipe | {rows[1]['psnr']:.4g} |" in printed


def test_each_choice_changes_one_thing(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []

    def main(given: train_tokenizer.TrainTokenizerConfig) -> None:
        output = Path(given.experiment.output_dir)
        output.mkdir(parents=True)
        (output / "metrics.json").write_text('{"verdict": []}')
        (output / "status.json").write_text('{"trained_s": 1}')
        given.experiment.output_dir = ""
        found.append(given)

    monkeypatch.setattr(train_tokenizer, "main", main)
    for number, choice in enumerate(tokenizer.CHOICES):
        tokenizer.train(config, choice, steps=40, output=tmp_path / str(number))
    recipe, convolutional = found[0], found[-1]
    assert (recipe.training.max_train_steps, recipe.vq_training.perceptual_start) == (40, 20)
    assert convolutional.model.vq_model.model_type == "maskgit_vq"
    assert convolutional.vq_training == recipe.vq_training
    for one in found[1:-1]:
        assert one != recipe
        assert one.model == recipe.model


def test_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tokenizer, "ROUNDS", 1)
    benchmark.main(["tokenizer", "--speed", "16"])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["resolution"] == 16
    assert row["ratio"] == row["recipe"] / row["convolutional"] > 0


@pytest.mark.parametrize("arguments", [[], ["tokenizer.yaml", "--speed", "32"]])
def test_configs_or_speed(arguments: list[str]) -> None:
    with pytest.raises(InputError, match="expected either configs or --speed"):
        benchmark.main(["tokenizer", *arguments])
