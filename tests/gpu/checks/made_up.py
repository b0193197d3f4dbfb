"""Models and a training project for the checks, with random weights and codes: sizes of reAR-B, on a CPU tiny ones."""

from pathlib import Path

import numpy as np
import torch

from data.codes.conversion import jsonl_to_store
from data.codes.jsonl import Sizes, format_lines
from modeling.rear import ReAR
from modeling.tokenizers.registry import build_tokenizer
from scripts.benchmarks.sampling import random_model
from utils.config import load_config
from utils.files.weights import save_weights
from utils.schema import GeneratorConfig

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
USED_SHARE = 16  # every 16th code occurs, which a model learns in few steps
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


def made_up_model() -> tuple[ReAR, GeneratorConfig]:
    width, layers, tokens = (768, 24, 256) if ON_GPU else (32, 2, 40)
    return random_model(width=width, layers=layers, tokens=tokens)


def micro_batch_size() -> int:
    """Images of a micro-batch that fit in memory with reAR-B's training state."""
    if not ON_GPU:
        return 8
    return 64 if torch.cuda.get_device_properties(0).total_memory >= LARGE_MEMORY else 16


def make_project(folder: Path) -> list[str]:
    """Command line of a training project in `folder`, without `experiment.output_dir`."""
    arguments = [
        *(["config=configs/rear_b.yaml"] if ON_GPU else TINY),
        f"experiment.tokenizer_checkpoint={folder / 'tokenizer.safetensors'}",
        f"dataset.params.pretokenization={folder / 'codes.tokens'}",
        "dataset.params.num_workers_per_gpu=0",
        f"training.per_gpu_batch_size={micro_batch_size()}",
        "training.enable_wandb=false",
        "training.process_group_timeout=60",
        "training.max_train_steps=1000",
        "lr_scheduler.params.warmup_steps=10",
        "experiment.log_every=1",
        "experiment.generate_every=1000",
    ]
    model = load_config([*arguments, "experiment.output_dir=unused"]).model
    torch.manual_seed(0)
    save_weights(build_tokenizer(model.vq_model).state_dict(), folder / "tokenizer.safetensors")
    sizes = Sizes(model.vq_model.codebook_size, model.generator.image_seq_len, model.generator.condition_num_classes)
    rng, images = np.random.default_rng(0), 32 * micro_batch_size()
    codes = USED_SHARE * rng.integers(0, sizes.codebook_size // USED_SHARE, (images, sizes.image_seq_len))
    (folder / "codes.jsonl").write_bytes(format_lines(rng.integers(0, sizes.num_classes, images), codes))
    jsonl_to_store(folder / "codes.jsonl", folder / "codes.tokens", sizes, processes=1)
    return arguments
