"""Codebooks above 2^16 tokens: configs/rear_l_maskbit18.yaml on made-up tokens, from the store to sampled images."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.codes.store_files import StoreMeta
from data.codes.token_store import TokenStore
from data.codes.token_writer import new_token_store
from modeling.tokenizers.vq_plus import VQPlus
from scripts import inspect_codes, sample_imagenet_rear, train_rear
from tests.processes import SERVER
from tests.script_config import script_config
from utils.config import load_config
from utils.files.weights import save_weights

SMALL_TOKENIZER = [
    "model.vq_model.codebook_size=131072",
    "model.vq_model.token_size=17",
    "model.vq_model.hidden_channels=32",
    "model.vq_model.channel_mult=[1,1]",
    "model.vq_model.num_res_blocks=1",
    "model.vq_model.resolution=8",
    "dataset.preprocessing.crop_size=8",
    "dataset.preprocessing.resize_shorter_edge=8",
    "model.vq_model.num_latent_tokens=16",
    "model.generator.image_seq_len=16",
]


def config_of(folder: Path, tokenizer: list[str], *more: str) -> list[str]:
    return [
        "config=configs/rear_l_maskbit18.yaml",
        f"experiment.output_dir={folder / 'run'}",
        f"experiment.tokenizer_checkpoint={folder / 'tokenizer.safetensors'}",
        f"dataset.params.pretokenization={folder / 'codes.tokens'}",
        "dataset.params.train_shards_path_or_url=null",
        "dataset.params.eval_shards_path_or_url=null",
        "dataset.params.num_workers_per_gpu=0",
        "training.enable_wandb=false",
        "training.max_train_steps=2",
        "training.per_gpu_batch_size=2",
        "experiment.log_every=1",
        *tokenizer,
        *more,
    ]


def make_project(arguments: list[str], folder: Path) -> np.ndarray:
    """The tokenizer with random weights, and a store of random tokens, which are returned."""
    config = load_config(arguments)
    torch.manual_seed(0)
    save_weights(VQPlus.from_section(config.model.vq_model).state_dict(), folder / "tokenizer.safetensors")
    size, length = config.model.vq_model.codebook_size, config.model.generator.image_seq_len
    codes = np.random.default_rng(0).integers(0, size, (8, length))
    with new_token_store(folder / "codes.tokens", StoreMeta(length, size)) as writer:
        writer.append(codes, np.arange(8))
    return codes


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a small generator and a small tokenizer, of 17 bits."""
    sizes = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"]
    arguments = config_of(
        tmp_path,
        SMALL_TOKENIZER,
        *(f"model.generator.{size}" for size in sizes),
        "model.generator.decode_align_layer_idx=1",
        "model.generator.projection_dim=32",
        "model.generator.condition_num_classes=8",
        "sampling.num_fid_samples=4",
        "sampling.per_gpu_batch_size=4",
        f"dataset.params.eval_pretokenization={tmp_path / 'codes.tokens'}",
        "experiment.eval_every=2",
    )
    make_project(arguments, tmp_path)
    return arguments


def test_from_the_store_to_sampled_and_completed_images(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = TokenStore(tmp_path / "codes.tokens")
    assert store.codes.dtype == np.uint32
    assert store.codes.max() > 2**16
    train_rear.main(load_config(small))
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/ar_loss"] for line in logged if "train/ar_loss" in line]
    assert losses[0] == pytest.approx(np.log(2**17), rel=0.02)
    [validation] = [line["val/ar_loss"] for line in logged if "val/ar_loss" in line]
    assert validation == pytest.approx(np.log(2**17), rel=0.02)

    inspect_codes.main(script_config(inspect_codes, [*small, f"experiment.output_dir={tmp_path / 'inspected'}"]))
    statistics = json.loads((tmp_path / "inspected/statistics.json").read_text())
    assert statistics["entropy of the codes"] == "7.000 of 17.000 bits"  # 128 tokens, all different

    weights = f"experiment.generator_checkpoint={tmp_path / 'run'}"
    sample_imagenet_rear.main(load_config([*small, weights, f"experiment.output_dir={tmp_path / 'samples'}"]))
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 8, 8, 3)


def train_and_measure(arguments: list[str], result: Path) -> None:
    """Train without the final grid of samples, which takes minutes; write the peak of the resident memory in GiB."""
    train_rear.save_sample_grid = lambda *_: Image.new("RGB", (8, 8))
    train_rear.main(load_config(arguments))
    result.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


@pytest.mark.slow
def test_two_steps_with_24_layers_fit_6_gib(tmp_path: Path) -> None:
    """At width 192, since weights, gradients and moments of the 1.0 billion parameters at width 1024 alone take
    15 GiB."""
    sizes = ["hidden_size=192", "intermediate_size=768"]
    arguments = config_of(tmp_path, [], *(f"model.generator.{size}" for size in sizes))
    make_project(arguments, tmp_path)
    process = SERVER.Process(target=train_and_measure, args=(arguments, tmp_path / "peak"))
    process.start()
    process.join()
    assert 1 < float((tmp_path / "peak").read_text()) < 6
