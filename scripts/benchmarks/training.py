"""Training: steps of scripts/train_rear.py compared with steps of the published network (`baselines.py`).

On one batch of random codes, without reading data, logging and saving; in bf16 on a GPU, in float32 on a CPU. Losses
and gradients of both are compared in float32 first.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.training_batches import drop_class_labels, with_distinct_labels
from modeling.perturbation import num_perturbation_uniforms
from modeling.rear import ReAR
from modeling.targets.registry import Targets
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.training_step import compile_blocks, training_step
from scripts.benchmarks.baselines import published_block, published_loss
from scripts.benchmarks.measure import ceilings, describe, device, interleaved, peak_memory_mb, seconds
from utils.arguments import positive
from utils.config import Config, load_config
from utils.errors import InputError
from utils.optim import build_optimizers, set_learning_rate
from utils.precision import exact_attention_dropout, matmul_precision
from utils.randomness import sample_uniforms
from utils.run.sharding import clip_gradients

MAX_LOSS_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 1e-5, 1e-4  # relative
NEGLIGIBLE = 1e-3  # of the norm of the whole gradient
MAX_RATIO = 1.0  # upper bound of the perturbation rate, as at the start of training
Loss = Callable[[ReAR, Tokenizer, dict[str, Tensor], float, Config], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive, default=768, help="hidden size (reAR-S and -B: 768, -L: 1024)")
    parser.add_argument("--layers", type=positive, default=24, help="blocks (reAR-S: 20, -B and -L: 24)")
    parser.add_argument("--heads", type=positive, default=16, help="attention heads")
    parser.add_argument("--tokens", type=positive, default=256, help="codes per image; a square")
    parser.add_argument("--batch", type=positive, default=64, help="images per step")
    parser.add_argument("--classes", type=positive, default=1000, help="classes of the images, all equally likely")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="ours, as in training.compile")
    parser.add_argument("--precision", choices=["bf16", "no"], help="of ours; default: bf16 on a GPU, no on a CPU")
    parser.add_argument("--steps", type=positive, default=2, help="steps of each measurement")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each method")
    parser.add_argument("--eager-baseline", action="store_true", help="the published block without its torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of ours")


@exact_attention_dropout()
@matmul_precision(tf32=True)
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_from(arguments)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.model.vq_model).to(device()).eval().requires_grad_(False)
    model = ReAR(config.model).to(device())
    for block in model.blocks:  # adaLN starts at zero, which would hide the blocks from the comparison
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)  # type: ignore[index,union-attr]
    for notice in compile_blocks(model, config, device()):
        print(notice)
    batch = made_up_batch(model, config)
    uncompiled = partial(published_loss, block_function=published_block)
    check_equal(model, tokenizer, batch, config, uncompiled)
    block_function = published_block if arguments.eager_baseline else torch.compile(published_block)
    published = partial(published_loss, block_function=block_function)
    published_config = at_precision(config, default_precision())
    ways = {
        "ours": Steps(model, tokenizer, batch, config, loss=our_loss, fused=True),
        "published": Steps(model, tokenizer, batch, published_config, loss=published, fused=False),
    }
    first = {name: seconds(way.take) for name, way in ways.items()}
    flops = {"ours": ways["ours"].count_flops(our_loss), "published": ways["published"].count_flops(uncompiled)}
    memory = {name: way.peak_memory_mb() for name, way in ways.items()}
    limits = ceilings()
    functions = {name: partial(way.take, arguments.steps) for name, way in ways.items()}
    times = interleaved(functions, arguments.repeats, budget=math.inf)
    medians = {name: statistics.median(values) / arguments.steps for name, values in times.items()}
    labels = len(batch["class_labels"])
    print(
        f"ceiling: {limits['flops'] / 1e12:.3g} TFLOP/s (matrix product); {labels} labels in {arguments.batch} images"
    )
    for name in ways:
        print(
            f"  {name:10} {describe(times[name], arguments.steps / 1e3)} ms per step, "
            f"{arguments.batch / medians[name]:.4g} images/s, "
            f"{flops[name] / arguments.batch / 1e9:.4g} GFLOP per image, "
            f"{flops[name] / medians[name] / limits['flops']:.1%} of the ceiling, {memory[name]:.0f} MB, "
            f"first step {first[name]:.3g} s"
        )
    return {
        "device": device().type,
        "ratio_published": medians["published"] / medians["ours"],
        "samples_per_s": arguments.batch / medians["ours"],
        "samples_per_s_published": arguments.batch / medians["published"],
        "ms_per_step": medians["ours"] * 1e3,
        "ms_min": min(times["ours"]) / arguments.steps * 1e3,
        "flops_ratio": flops["published"] / flops["ours"],
        "gflop_per_image": flops["ours"] / arguments.batch / 1e9,
        "mfu": flops["ours"] / medians["ours"] / limits["flops"],
        "peak_bytes": memory["ours"] * 1e6,
        "peak_bytes_published": memory["published"] * 1e6,
        "ceiling_tflops": limits["flops"] / 1e12,
        "labels": labels,
        **vars(arguments),
    }


def config_from(arguments: argparse.Namespace) -> Config:
    sizes = {
        "vq_model.resolution": 16 * math.isqrt(arguments.tokens),
        "generator.hidden_size": arguments.width,
        "generator.num_hidden_layers": arguments.layers,
        "generator.num_attention_heads": arguments.heads,
        "generator.intermediate_size": 4 * arguments.width,
        "generator.condition_num_classes": arguments.classes,
        "generator.projection_dim": arguments.width * 8 // 3,  # as 768 to 2048
        "generator.decode_align_layer_idx": arguments.layers * 3 // 4,
        "generator.use_checkpoint": str(arguments.checkpointing).lower(),
    }
    return load_config(
        [
            "experiment.output_dir=unused",
            f"training.per_gpu_batch_size={arguments.batch}",
            f"training.mixed_precision={arguments.precision or default_precision()}",
            f"training.compile={arguments.compile}",
            *(f"model.{name}={value}" for name, value in sizes.items()),
        ]
    )


def default_precision() -> str:
    return "bf16" if device().type == "cuda" else "no"


def at_precision(config: Config, precision: Any) -> Config:
    return replace(config, training=replace(config.training, mixed_precision=precision))


def made_up_batch(model: ReAR, config: Config) -> dict[str, Tensor]:
    """Random codes and labels, prepared as `data.training_batches` does."""
    size, generator = config.training.per_gpu_batch_size, config.model.generator
    labels = drop_class_labels(torch.randint(model.num_classes, (size,)), torch.rand(size), generator)
    batch = {"codes": torch.randint(model.codebook_size, (size, model.image_seq_len)), "class_labels": labels}
    batch["perturbation_uniforms"] = sample_uniforms(0, 0, range(size), num_perturbation_uniforms(model.image_seq_len))
    return {name: values.to(device()) for name, values in with_distinct_labels(batch).items()}


def our_loss(model: ReAR, tokenizer: Tokenizer, batch: dict[str, Tensor], max_ratio: float, config: Config) -> Tensor:
    return training_step(model, tokenizer, batch, max_ratio, config, Targets(config, tokenizer)).loss


class Steps:
    """A way to train a model on one batch."""

    def __init__(
        self, model: ReAR, tokenizer: Tokenizer, batch: dict[str, Tensor], config: Config, loss: Loss, fused: bool
    ) -> None:
        self.model, self.config = model.train(), config
        self.step = 0
        self.optimizers = build_optimizers(model, config)
        for group in self.optimizers["optimizer"].param_groups:
            group["fused"] = group["fused"] if fused else None  # None: torch's default, which is not fused
        self._inputs = (model, tokenizer, batch, MAX_RATIO, config)
        self._loss = loss

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            set_learning_rate(self.optimizers, self.step, self.config)
            loss = self._loss(*self._inputs)
            loss.backward()
            norm = clip_gradients(self.model, self.config.training.max_grad_norm)
            if not math.isfinite((loss.detach() + norm).item()):  # training waits for this too
                raise InputError(f"step {self.step}: loss or gradient not finite")
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            self.step += 1

    def count_flops(self, loss: Loss) -> float:
        """FLOPs of forward and backward pass of `loss`, uncompiled, since compiled code is not counted."""
        with FlopCounterMode(display=False) as counter:
            loss(*self._inputs).backward()
        self.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def peak_memory_mb(self) -> float:
        """Peak of a step; on a CPU, of the process so far."""
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.take()
        return peak_memory_mb()


@matmul_precision(tf32=False)
def check_equal(model: ReAR, tokenizer: Tokenizer, batch: dict[str, Tensor], config: Config, published: Loss) -> None:
    """
    Raises:
        InputError: loss or gradients differ from the published ones, in float32 and without dropout.
    """
    exact = at_precision(config, "no")
    loss, gradients = loss_and_gradients(model, lambda: our_loss(model, tokenizer, batch, MAX_RATIO, exact))
    expected_loss, expected = loss_and_gradients(model, lambda: published(model, tokenizer, batch, MAX_RATIO, exact))
    if not abs(loss - expected_loss) <= MAX_LOSS_DIFFERENCE * abs(expected_loss):
        raise InputError(f"loss: found {loss:.8g}, expected {expected_loss:.8g} of the published network")
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    for name, gradient in gradients.items():
        scale = expected[name].norm().clamp(min=NEGLIGIBLE * whole)  # a key bias has gradient 0, up to rounding
        difference = ((gradient - expected[name]).norm() / scale).item()
        if not difference <= MAX_GRADIENT_DIFFERENCE:
            raise InputError(
                f"gradient of {name}: relative difference {difference:.3g} from the published network, "
                f"expected at most {MAX_GRADIENT_DIFFERENCE:g}"
            )
    print(f"losses and gradients equal those of the published network in float32 ({loss:.7g}, {expected_loss:.7g})")


def loss_and_gradients(model: ReAR, loss_of: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by parameter name, without dropout."""
    model.eval()
    loss = loss_of()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients
