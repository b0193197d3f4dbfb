"""Training: whole steps as in scripts/train_rear.py on made-up codes, without reading data, logging and saving.

In bf16 on a GPU, in float32 on a CPU. The gate before it compares the loss with that in float32.
"""

import argparse
import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modeling.rear import ReAR
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.training_step import num_uniforms, training_cost, training_step
from scripts.benchmarks.measure import ceilings, describe, device, peak_memory_mb, seconds
from utils.config import Config, load_config
from utils.errors import InputError
from utils.optim import build_optimizer, set_learning_rate
from utils.precision import matmul_precision
from utils.randomness import sample_uniforms
from utils.run.sharding import clip_gradients

MAX_LOSS_DIFFERENCE = 0.01  # relative
MAX_RATIO = 1.0  # of replaced codes, as at the beginning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=768, help="hidden size (reAR-S and -B: 768, -L: 1024)")
    parser.add_argument("--layers", type=int, default=24, help="blocks (reAR-S: 20, -B and -L: 24)")
    parser.add_argument("--heads", type=int, default=16, help="attention heads")
    parser.add_argument(
        "--resolution", type=int, default=256, help="pixels; a multiple of 16, with a code for each 16 x 16"
    )
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--steps", type=int, default=5, help="steps of each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")


@matmul_precision(tf32=True)
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_of(arguments)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.model.vq_model).to(device()).eval().requires_grad_(False)
    model = ReAR(config.model).to(device())
    steps = Steps(model, tokenizer, config)
    check_loss(steps)
    first = seconds(lambda: steps.take(1))
    memory_of_step = peak_memory_mb()
    limits = ceilings()
    times = [seconds(lambda: steps.take(arguments.steps)) for _ in range(arguments.repeats)]
    step_s = statistics.median(times) / arguments.steps
    flops = training_cost(model, config).flops * arguments.batch
    print(f"ceiling: {limits['flops'] / 1e12:.3g} TFLOP/s (matrix product); first step {first:.3g} s")
    print(f"batch {arguments.batch}, {memory_of_step:.0f} MB: {describe(times, arguments.steps / 1e3)} ms per step, "
          f"{arguments.batch / step_s:.4g} images/s, {flops / step_s / limits['flops']:.1%} of it")  # fmt: skip
    return {
        "device": device().type,
        "images_per_s": arguments.batch / step_s,
        "ms_per_step": step_s * 1e3,
        "seconds_min": min(times) / arguments.steps,
        "seconds_max": max(times) / arguments.steps,
        "cold_start_s": first,
        "peak_memory_mb": memory_of_step,
        "gflop_per_image": flops / arguments.batch / 1e9,
        "share_of_flops": flops / step_s / limits["flops"],
        "ceiling_tflops": limits["flops"] / 1e12,
        **{name: getattr(arguments, name) for name in ("width", "layers", "resolution", "batch", "checkpointing")},
    }


def config_of(arguments: argparse.Namespace) -> Config:
    sizes = {
        "vq_model.resolution": arguments.resolution,
        "generator.hidden_size": arguments.width,
        "generator.num_hidden_layers": arguments.layers,
        "generator.num_attention_heads": arguments.heads,
        "generator.intermediate_size": 4 * arguments.width,
        "generator.decode_align_layer_idx": arguments.layers * 3 // 4,
        "generator.use_checkpoint": str(arguments.checkpointing).lower(),
    }
    return load_config(
        [
            "experiment.output_dir=unused",
            f"training.per_gpu_batch_size={arguments.batch}",
            f"training.mixed_precision={'bf16' if device().type == 'cuda' else 'no'}",
            *(f"model.{name}={value}" for name, value in sizes.items()),
        ]
    )


class Steps:
    """A model in training and one batch, on which all steps are taken."""

    def __init__(self, model: ReAR, tokenizer: Tokenizer, config: Config) -> None:
        self.model, self.tokenizer, self.config = model.train(), tokenizer, config
        self.optimizer, batch = build_optimizer(model, config), config.training.per_gpu_batch_size
        codes = torch.randint(model.codebook_size, (batch, model.image_seq_len), device=device())
        labels = torch.randint(model.num_classes, (batch,), device=device())
        self.batch, self.step = {"codes": codes, "class_labels": labels}, 0

    def loss(self, config: Config) -> Tensor:
        shape = config.training.per_gpu_batch_size, num_uniforms(self.model.image_seq_len)
        uniforms = sample_uniforms(config.training.seed, self.step, 0, *shape)
        batch = {**self.batch, "uniforms": uniforms.to(device())}
        return training_step(self.model, self.tokenizer, batch, MAX_RATIO, config).loss

    def take(self, count: int) -> None:
        for _ in range(count):
            self._one()

    def _one(self) -> None:
        set_learning_rate(self.optimizer, self.step, self.config)
        loss = self.loss(self.config)
        loss.backward()
        norm = clip_gradients(self.model, self.config.training.max_grad_norm, sharded=False)
        if not math.isfinite((loss.detach() + norm).item()):  # as in training, each step waits for this answer
            raise InputError(f"step {self.step}: loss or gradient not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


@torch.no_grad()
def check_loss(steps: Steps) -> None:
    """
    Raises:
        InputError: in the precision that is measured, the loss is not that in float32.
    """
    steps.model.eval()
    exact_config = replace(steps.config, training=replace(steps.config.training, mixed_precision="no"))
    exact, measured = (steps.loss(config).item() for config in (exact_config, steps.config))
    if not abs(measured - exact) <= MAX_LOSS_DIFFERENCE * abs(exact):
        raise InputError(
            f"gate: loss {measured:.6g}, expected {exact:.6g} as in float32, within {MAX_LOSS_DIFFERENCE:.0%}"
        )
    steps.model.train()
