"""Shared fixtures: a tiny model, a tiny project on disk."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

if "TESTS_ON_GPU" not in os.environ:  # numbers are those of a CPU, and ranks are more than there are GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.rear import ReAR
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from tests.processes import kill_started
from utils.config import load_config, save_config
from utils.files.weights import save_weights
from utils.schema import GeneratorConfig, ModelConfig, VQModelConfig


@pytest.fixture
def tiny_config() -> ModelConfig:
    """V = 24 codes, N = 16 per image, 5 classes, 2 blocks; no dropout."""
    return ModelConfig(
        vq_model=VQModelConfig(codebook_size=24, token_size=8, num_latent_tokens=16),
        generator=GeneratorConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            dropout=0.0,
            attn_drop=0.0,
            image_seq_len=16,
            condition_num_classes=5,
            guidance_scale=3.0,
            decode_align_layer_idx=1,
            projection_dim=16,
            z_dim=8,
        ),
    )


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> ReAR:
    """In eval mode, with random weights everywhere: the zero-initialised adaLN would hide much of the network."""
    torch.manual_seed(0)
    model = ReAR(tiny_config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def no_process_outlives_a_test() -> Iterator[None]:
    yield
    kill_started()


@pytest.fixture(scope="session")
def tiny_config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_project(tmp_path_factory.mktemp("tiny_project"))


def make_tiny_project(folder: Path) -> Path:
    """YAML of a tiny project: random tokenizer (16 px, 16 codes), 50 code sequences of 5 classes."""
    arguments = [
        f"experiment.tokenizer_checkpoint={folder / 'tokenizer.safetensors'}",
        "experiment.log_every=1",
        "experiment.generate_every=1000",
        "model.vq_model.codebook_size=24",
        "model.vq_model.token_size=8",
        "model.vq_model.num_latent_tokens=16",
        "model.vq_model.resolution=16",
        "model.vq_model.hidden_channels=8",
        "model.vq_model.channel_mult=[1,1,2]",
        "model.vq_model.num_res_blocks=1",
        "model.generator.hidden_size=32",
        "model.generator.num_hidden_layers=2",
        "model.generator.num_attention_heads=4",
        "model.generator.intermediate_size=64",
        "model.generator.image_seq_len=16",
        "model.generator.condition_num_classes=5",
        "model.generator.decode_align_layer_idx=1",
        "model.generator.projection_dim=16",
        "model.generator.z_dim=8",
        "model.generator.randomness_anneal_end=30",
        f"dataset.params.pretokenization={folder / 'codes.jsonl'}",
        "dataset.params.num_workers_per_gpu=0",
        "dataset.preprocessing.resize_shorter_edge=16",
        "dataset.preprocessing.crop_size=16",
        "optimizer.params.learning_rate=1e-3",
        "lr_scheduler.params.warmup_steps=5",
        "training.per_gpu_batch_size=8",
        "training.mixed_precision=no",
        "training.enable_wandb=false",
        "training.max_train_steps=40",
        "sampling.num_fid_samples=37",
        "sampling.per_gpu_batch_size=8",
    ]
    config = load_config(["experiment.output_dir=unused", *arguments])
    save_config(config, folder / "tiny.yaml")
    torch.manual_seed(0)
    save_weights(MaskGitVQ(config.model.vq_model).state_dict(), folder / "tokenizer.safetensors")
    rng = np.random.default_rng(0)
    with (folder / "codes.jsonl").open("w") as file:
        for i in range(50):
            file.write(json.dumps({"class_id": i % 5, "tokens": rng.integers(0, 24, 16).tolist()}) + "\n")
    return folder / "tiny.yaml"


def make_noise_images(folder: Path, per_class: int, height: int, width: int) -> Path:
    """Classes cat and dog of noise images, as PNG files 0, 1, ..."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_arguments(tiny_config_file: Path) -> list[str]:
    """The tiny project's command line, without `experiment.output_dir`."""
    return [f"config={tiny_config_file}"]
