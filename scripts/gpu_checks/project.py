"""A project to train on: made-up codes, and a tokenizer with random weights; the sizes of reAR-B, or on a CPU tiny."""

from pathlib import Path

import numpy as np
import torch

from data.codes.conversion import jsonl_to_store
from data.codes.jsonl import Sizes, format_lines
from modeling.tokenizers.registry import build_tokenizer
from scripts.gpu_checks.findings import Machine
from utils.config import load_config
from utils.files.weights import save_weights

USED_SHARE = 16  # every 16th code is in use, which a model learns in few steps
LARGE_MEMORY = 60e9  # bytes
TINY = (
    "model.vq_model.codebook_size=64",
    "model.vq_model.token_size=8",
    "model.vq_model.resolution=16",
    "model.vq_model.hidden_channels=8",
    "model.vq_model.channel_mult=[1,1,2]",
    "model.vq_model.num_res_blocks=1",
    "model.generator.hidden_size=32",
    "model.generator.num_hidden_layers=2",
    "model.generator.num_attention_heads=4",
    "model.generator.intermediate_size=64",
    "model.generator.condition_num_classes=10",
    "model.generator.decode_align_layer_idx=1",
    "model.generator.projection_dim=16",
)


def batch_size(machine: Machine) -> int:
    """Images of a micro-batch that fit beside reAR-B's state in training."""
    if machine.gpus == 0:
        return 8
    return 64 if machine.memory >= LARGE_MEMORY else 16


def made_up_project(machine: Machine, work: Path) -> list[str]:
    """Its command line, without `experiment.output_dir`."""
    arguments = ["config=configs/rear_b.yaml"] if machine.gpus else list(TINY)
    arguments += [
        f"experiment.tokenizer_checkpoint={work / 'tokenizer.safetensors'}",
        f"dataset.params.pretokenization={work / 'codes.tokens'}",
        "dataset.params.num_workers_per_gpu=0",
        f"training.per_gpu_batch_size={batch_size(machine)}",
        "training.enable_wandb=false",
        "training.process_group_timeout=60",
        "training.max_train_steps=1000",
        "lr_scheduler.params.warmup_steps=10",
        "experiment.log_every=1",
    ]
    model = load_config([*arguments, "experiment.output_dir=unused"]).model
    torch.manual_seed(0)
    save_weights(build_tokenizer(model.vq_model).state_dict(), work / "tokenizer.safetensors")
    sizes = Sizes(model.vq_model.codebook_size, model.generator.image_seq_len, model.generator.condition_num_classes)
    rng, images = np.random.default_rng(0), 32 * batch_size(machine)
    codes = USED_SHARE * rng.integers(0, sizes.codebook_size // USED_SHARE, (images, sizes.image_seq_len))
    (work / "codes.jsonl").write_bytes(format_lines(rng.integers(0, sizes.num_classes, images), codes))
    jsonl_to_store(work / "codes.jsonl", work / "codes.tokens", sizes, processes=1)
    return arguments
