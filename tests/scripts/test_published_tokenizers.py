"""The released rear_vqplus.yaml, which its own code cannot train, from images to samples in small; and MaskBit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.tokenizers.registry import build_tokenizer
from scripts import inspect_codes, pretokenize, reconstruct, sample_imagenet_rear, train_rear
from tests.conftest import make_noise_images
from tests.script_config import script_config
from utils.config import load_config
from utils.files.weights import save_weights
from utils.schema import Config

RELEASED = """
experiment: {project: rear, name: rear-l-vqplus, output_dir: rear_l_vqplus, max_train_examples: 1_281_167,
  log_grad_norm_every: 1_000, resume: True, tokenizer_checkpoint: ckpt/vqplus.bin}
model:
  vq_model: {model_type: vqplus, quantizer_type: lookup, codebook_size: 4096, token_size: 64, commitment_cost: 0.25,
    entropy_loss_weight: 0.0, entropy_loss_temperature: 0.01, entropy_gamma: 1.0, num_channels: 3, hidden_channels: 128,
    channel_mult: [1, 1, 2, 2, 4], num_resolutions: 5, num_res_blocks: 2, sample_with_conv: True}
  generator: {hidden_size: 1024, num_hidden_layers: 24, num_attention_heads: 16, intermediate_size: 4096,
    image_seq_len: 256, condition_num_classes: 1000, kv_cache: True}
dataset: {params: {pretokenization: dataset/pretokenized/vqplus.jsonl}}
optimizer: {name: adamw, params: {learning_rate: 1e-4}}
"""
SMALL = (
    *("model.vq_model.hidden_channels=8", "model.vq_model.channel_mult=[1,2]", "model.vq_model.num_res_blocks=1"),
    *("model.vq_model.resolution=16", "model.generator.image_seq_len=64", "model.generator.hidden_size=32"),
    *("model.generator.num_hidden_layers=1", "model.generator.num_attention_heads=4"),
    *("model.generator.intermediate_size=32", "model.generator.decode_align_layer_idx=0"),
    *("model.generator.condition_num_classes=2", "dataset.preprocessing.pretokenize_crops=center"),
    *("dataset.params.num_workers_per_gpu=0", "training.enable_wandb=false", "training.max_train_steps=2"),
    *("training.per_gpu_batch_size=2", "training.mixed_precision=no", "lr_scheduler.params.warmup_steps=1"),
    *("sampling.num_fid_samples=4", "sampling.per_gpu_batch_size=4", "experiment.resume=auto"),
)
LOOKUP = ("model.vq_model.codebook_size=32", "model.vq_model.token_size=6")
SIGNS = ("model.vq_model.quantizer_type=lookup-free", "model.vq_model.codebook_size=64", "model.vq_model.token_size=6")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    (tmp_path / "rear_vqplus.yaml").write_text(RELEASED)
    return tmp_path / "rear_vqplus.yaml"


def test_its_keys_load(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config([f"config={released}"])
    assert (config.model.generator.z_dim, config.model.vq_model.num_latent_tokens) == (64, 256)
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 9
    assert f"{released}: model.vq_model.commitment_cost has no effect and is ignored" in notices


@pytest.mark.parametrize("quantizer", [LOOKUP, SIGNS])
def test_from_images_to_samples(released: Path, tmp_path: Path, quantizer: tuple[str, ...]) -> None:
    images = make_noise_images(tmp_path / "images", per_class=2, height=16, width=16)
    paths = [
        f"dataset.params.train_shards_path_or_url={images}",
        f"dataset.params.eval_shards_path_or_url={images}",
        f"dataset.params.pretokenization={tmp_path / 'codes.tokens'}",
        f"experiment.tokenizer_checkpoint={tmp_path / 'tokenizer.safetensors'}",
    ]
    arguments = [f"config={released}", *SMALL, *quantizer, *paths]

    def config(name: str, *more: str) -> Config:
        return load_config([*arguments, f"experiment.output_dir={tmp_path / name}", *more])

    torch.manual_seed(0)
    save_weights(build_tokenizer(config("x").model.vq_model).state_dict(), tmp_path / "tokenizer.safetensors")
    pretokenize.main(config("x"))
    inspect_codes.main(script_config(inspect_codes, [*arguments, f"experiment.output_dir={tmp_path / 'codes'}"]))
    assert train_rear.main(config("run")) == "completed"
    sample_imagenet_rear.main(config("samples", f"experiment.generator_checkpoint={tmp_path / 'run'}"))
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 16, 16, 3)
    reconstruct.main(config("reconstructions"))
    assert np.load(tmp_path / "reconstructions/reconstructions.npz")["arr_0"].shape == (4, 16, 16, 3)
