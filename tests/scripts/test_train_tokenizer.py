"""Training and evaluating a tiny tokenizer on a few made-up images."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling.loading import load_tokenizer
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from scripts import reconstruct, train_tokenizer
from tests.processes import run_script
from tests.script_config import script_config
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.files.weights import load_state_dict
from utils.run.metrics_file import read_metrics

SCRIPT = "scripts/train_tokenizer.py"


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


def config_of(*given: Any) -> train_tokenizer.TrainTokenizerConfig:
    return script_config(train_tokenizer, arguments(*given))


def test_training_run(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_of(tiny_arguments, images, run)
    train_tokenizer.main(config)
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["train/l1"] for row in rows if "train/l1" in row]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert [row["step"] for row in rows if "train/revived_codes" in row] == list(range(4, 30, 4))

    figures = json.loads((run / "metrics.json").read_text())
    assert (figures["step"], figures["images"]) == (30, 16)
    assert figures["psnr"] > 10
    assert script_config(train_tokenizer, [f"config={run / 'config.yaml'}"]) == config
    assert Image.open(run / "reconstructions.png").size == (16 * 18 - 2, 2 * 18 - 2)
    weights = load_state_dict(run / "tokenizer.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    config.experiment.tokenizer_checkpoint = str(run / "tokenizer.safetensors")
    assert load_tokenizer(config).codebook_size == 24

    config.experiment.output_dir = str(tmp_path / "reconstructions")
    reconstruct.main(config)  # of the weights as saved, rounded to float16
    of_file = json.loads((tmp_path / "reconstructions/reconstruct.json").read_text())
    names = ("images", "psnr", "l1", "codebook_used", "codebook_perplexity")
    assert [of_file[name] for name in names] == pytest.approx([figures[name] for name in names], rel=1e-6)
    assert rows[-1]["heldout/psnr"] == figures["psnr"]


def test_another_tokenizer_is_trained(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    """Its codebook vectors have unit length, and the entropy term enters the loss."""
    more = ["model.vq_model.model_type=llamagen_vq", "model.vq_model.z_channels=8", "vq_training.entropy_weight=0.1"]
    more.append("training.max_train_steps=6")
    config = config_of(tiny_arguments, images, tmp_path / "run", *more)
    train_tokenizer.main(config)
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "train/loss" in row]
    assert rows[-1]["train/l1"] < 0.9 * rows[0]["train/l1"]
    terms = {"l1": 1, "mse": 1, "perceptual": 0.1, "commitment": 1.25, "code_entropy": 0.1}
    loss = sum(weight * rows[0][f"train/{name}"] for name, weight in terms.items())
    assert rows[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[0]["train/code_entropy"] < 0
    config.experiment.tokenizer_checkpoint = str(tmp_path / "run/tokenizer.safetensors")
    vectors = load_tokenizer(config).codebook_lookup(torch.arange(24)[None])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(1, 24))


RECIPE = [
    "model.vq_model.model_type=patch_vq",
    "model.vq_model.channel_mult=[1,1,1]",
    "training.use_ema=true",
    "vq_training.codebook_init=kmeans",
    "vq_training.color_weight=0.5",
    "vq_training.perceptual_start=3",
    "vq_training.perceptual_fraction=0.5",
]


def test_recipe_for_own_images(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    """It starts near k-means of patches, computes features late, and exports the EMA; its verdict is written."""
    run = tmp_path / "run"
    config = config_of(tiny_arguments, images, run, *RECIPE, "training.max_train_steps=6")
    train_tokenizer.main(config)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert rows[0]["train/l1"] < 0.03  # of a random tokenizer: 0.4
    assert ["train/perceptual" in row for row in rows] == [False] * 3 + [True] * 3
    for row, perceptual_weight in ((rows[0], 0), (rows[-1], 0.1)):
        terms = {"l1": 1, "mse": 1, "commitment": 1.25, "color": 0.5, "perceptual": perceptual_weight}
        loss = sum(weight * row.get(f"train/{name}", 0) for name, weight in terms.items())
        assert row["train/loss"] == pytest.approx(loss, rel=1e-5)
    average, last = (load_file(run / f"checkpoint-6/{name}.safetensors") for name in ("ema", "model"))
    exported = load_file(run / "tokenizer.safetensors")
    name = "decoder.conv_out.weight"
    assert torch.equal(exported[name], average[name].half())
    assert not torch.equal(average[name], last[name])
    figures = json.loads((run / "metrics.json").read_text())
    assert (figures["psnr"], figures["patch_psnr"]) > (25, 40)  # few patches differ
    assert figures["reconstruction_distance"] > 0
    assert figures["verdict"][0].startswith(f"tokenizer: PSNR {figures['psnr']:.1f} dB")
    assert all(line in (run / "log.txt").read_text() for line in figures["verdict"])
    assert Image.open(run / "worst.png").size == (10 * 18 - 2, 2 * 18 - 2)


@pytest.mark.slow
def test_the_recipe_killed_in_a_save_continues_bit_for_bit(
    tiny_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    more = [*RECIPE, "training.max_train_steps=8", "experiment.save_every=4"]
    train_tokenizer.main(config_of(tiny_arguments, images, tmp_path / "whole", *more))
    command = arguments(tiny_arguments, images, tmp_path / "killed", *more)
    assert run_script([SCRIPT, *command], tmp_path, REAR_FAULT="save.discriminator.8").returncode == -signal.SIGKILL
    again = run_script([SCRIPT, *command], tmp_path)
    assert again.returncode == 0, again.stderr
    files = [(tmp_path / run / "tokenizer.safetensors").read_bytes() for run in ("killed", "whole")]
    assert files[0] == files[1]


def test_training_starts_from_given_weights(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train_tokenizer.main(config_of(tiny_arguments, images, first))
    more = [f"vq_training.init_from={first / 'tokenizer.safetensors'}", "training.max_train_steps=1"]
    train_tokenizer.main(config_of(tiny_arguments, images, tmp_path / "second", *more))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("first", "second")]
    assert rows[1][0]["train/l1"] < 0.7 * rows[0][0]["train/l1"]
    absent = arguments(tiny_arguments, images, tmp_path / "third", "vq_training.init_from=absent.safetensors")
    with pytest.raises(InputError, match=r"absent\.safetensors: no such weights file"):
        train_tokenizer.main(script_config(train_tokenizer, absent))


def test_a_full_disk_costs_figures_on_the_way_but_not_the_run(
    tiny_arguments: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["training.max_train_steps=2", "experiment.save_every=1"]

    def run(name: str, number_of_failures: int) -> str:
        failures = iter(range(number_of_failures))

        def write(path: Path, image: Image.Image) -> None:
            if next(failures, None) is not None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(train_tokenizer, "write_png", write)
        return train_tokenizer.main(config_of(tiny_arguments, images, tmp_path / name, *more))

    assert run("first", 1) == "completed"
    assert "weights and metrics of step 1: " in (tmp_path / "first/log.txt").read_text()
    with pytest.raises(OSError, match="No space left"):
        run("last", 2)


def test_same_seed_same_weights(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        train_tokenizer.main(
            script_config(
                train_tokenizer, arguments(tiny_arguments, images, tmp_path / name, "training.max_train_steps=3")
            )
        )
        weights.append((tmp_path / name / "tokenizer.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_run_killed_in_a_save_continues_bit_for_bit(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    """With codes revived and the discriminator updated before and after."""
    more = ["vq_training.adversarial_weight=0.5", "training.max_train_steps=12", "experiment.save_every=4"]
    train_tokenizer.main(config_of(tiny_arguments, images, tmp_path / "whole", *more))
    command = arguments(tiny_arguments, images, tmp_path / "killed", *more)
    assert run_script([SCRIPT, *command], tmp_path, REAR_FAULT="save.discriminator.8").returncode == -signal.SIGKILL
    assert read_metrics(tmp_path / "killed/metrics.jsonl")[-1]["step"] >= 6
    again = run_script([SCRIPT, *command], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "steps 4 to 12" in (tmp_path / "killed/log.txt").read_text()
    for file in ("tokenizer.safetensors", "checkpoint-12/model.safetensors", "checkpoint-12/discriminator.safetensors"):
        ours, theirs = (load_file(tmp_path / run / file) for run in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("killed", "whole")]
    ours, theirs = ([{k: v for k, v in row.items() if not k.startswith("perf/")} for row in of_run] for of_run in rows)
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_as_one_does(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    more = ["vq_training.adversarial_weight=0.5", "training.max_train_steps=6", "vq_training.revive_every=100"]
    init = tmp_path / "init"  # without it, the codes would be set to features of the first half of the batch alone
    train_tokenizer.main(config_of(tiny_arguments, images, init, "training.max_train_steps=1"))
    more.append(f"vq_training.init_from={init / 'tokenizer.safetensors'}")
    train_tokenizer.main(config_of(tiny_arguments, images, tmp_path / "one", *more))
    command = arguments(tiny_arguments, images, tmp_path / "two", *more, "training.per_gpu_batch_size=4")
    result = run_script([SCRIPT, *command], tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two"))
    for name in ("train/l1", "train/commitment", "train/discriminator"):  # later a rounding makes a code another one
        assert [row[name] for row in two[:3]] == pytest.approx([row[name] for row in one[:3]], abs=1e-3), name


@pytest.mark.slow
def test_adversarial_training(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    """The discriminator learns, its judgement enters the tokenizer's loss, and its weights are not exported."""
    weight = ["vq_training.adversarial_weight=0.5", "training.max_train_steps=20"]
    train_tokenizer.main(config_of(tiny_arguments, images, tmp_path / "run", *weight))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert rows[0]["train/discriminator"] == pytest.approx(1, abs=0.2)
    assert rows[-1]["train/discriminator"] < 0.9 * rows[0]["train/discriminator"]
    assert not any("heads" in key for key in load_state_dict(tmp_path / "run" / "tokenizer.safetensors"))
    plain = arguments(tiny_arguments, images, tmp_path / "plain", "training.max_train_steps=1")
    train_tokenizer.main(script_config(train_tokenizer, plain))
    without = read_metrics(tmp_path / "plain" / "metrics.jsonl")[0]
    assert "train/generator" not in without
    assert rows[0]["train/loss"] == pytest.approx(without["train/loss"] + 0.5 * rows[0]["train/generator"], rel=1e-5)


def test_replaced_codes_are_features(tiny_arguments: list[str], images: Path) -> None:
    config = config_of(tiny_arguments, images, Path("unused"))
    tokenizer = MaskGitVQ(config.model.vq_model)
    before = tokenizer.quantize.embedding.weight.detach().clone()
    batch = torch.rand(4, 3, 16, 16)
    codes = torch.tensor([3, 20])
    train_tokenizer.CodeUsage.replace(tokenizer, codes, batch, DistributedContext(0, 1, torch.device("cpu")))
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
        (
            "model.vq_model.model_type=vqplus",
            "model_type=vqplus: expected one of maskgit_vq, llamagen_vq, taming_vqgan",
        ),
    ],
)
def test_input_errors(tiny_arguments: list[str], images: Path, tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_tokenizer.main(config_of(tiny_arguments, images, tmp_path / "run", argument))
    assert not (tmp_path / "run").exists()
