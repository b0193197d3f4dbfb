"""Decoding codes to bytes: `modeling.sampling.image_sampler` against the plain tokenizer, float32 and whole batches."""

import argparse
import statistics
from typing import Any

import numpy as np
import torch

from modeling.sampling.image_sampler import ImageDecoder
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from scripts.benchmarks.measure import ceilings, describe, device, interleaved, peak_memory_mb
from utils.errors import InputError
from utils.images import to_uint8
from utils.precision import matmul_precision
from utils.schema import VQModelConfig

MAX_GREY_LEVELS = 0.15  # mean absolute difference that the gate accepts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=int, default=256, help="pixels; a multiple of 16")
    parser.add_argument("--channels", type=int, default=128, help="of the first level; the published tokenizer: 128")
    parser.add_argument("--batch", type=int, default=50, help="images per batch")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way")


@matmul_precision(tf32=True)
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    config = VQModelConfig(resolution=arguments.resolution, hidden_channels=arguments.channels)
    tokenizer = build_tokenizer(config).to(device()).eval().requires_grad_(False)
    codes = torch.randint(config.codebook_size, (arguments.batch, tokenizer.image_seq_len), device=device())
    decoder = ImageDecoder(tokenizer, "truncate", torch.float16 if device().type == "cuda" else torch.float32)
    ways = {
        "ours": lambda: decoder.finish(decoder.start(codes)),
        "plain": torch.inference_mode()(lambda: to_uint8(tokenizer.decode(codes))),
    }
    levels = float(np.abs(ways["ours"]().astype(int) - ways["plain"]()).mean())  # the warm-up
    if levels > MAX_GREY_LEVELS:
        raise InputError(f"gate: {levels:.3f} grey levels between both, expected at most {MAX_GREY_LEVELS}")
    memory, limits = peak_memory_mb(), ceilings()
    times = interleaved(ways, arguments.repeats, budget=120)
    medians = {name: statistics.median(values) for name, values in times.items()}
    flops = decoder_flops(tokenizer) * arguments.batch
    print(f"mean difference {levels:.4f} grey levels, {flops / arguments.batch / 1e9:.4g} GFLOP per image as published")
    for name, values in times.items():
        print(f"  {name:6} {describe(values)} s per batch, {arguments.batch / medians[name]:.4g} images/s")
    return {
        "device": device().type,
        "images_per_s": arguments.batch / medians["ours"],
        "images_per_s_plain": arguments.batch / medians["plain"],
        "ratio_plain": medians["plain"] / medians["ours"],
        "grey_levels": levels,
        "peak_memory_mb": memory,
        "share_of_flops": flops / medians["ours"] / limits["flops"],
        **{name: getattr(arguments, name) for name in ("resolution", "channels", "batch")},
    }


def decoder_flops(tokenizer: Tokenizer) -> float:
    """Of all convolutions that decoding one image runs through."""
    total = 0.0

    def count(module: torch.nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    convolutions = [module for module in tokenizer.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [module.register_forward_hook(count) for module in convolutions]
    tokenizer.decode(torch.zeros(1, tokenizer.image_seq_len, dtype=torch.int64, device=device()))
    for hook in hooks:
        hook.remove()
    return total
