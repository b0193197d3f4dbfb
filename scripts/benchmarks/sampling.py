"""Sampling codes: `modeling.sampling.generate` compared with the published sampler and two KV caches (`baselines.py`).

The weights are random, which does not affect the time. Codes are compared in float32; the measurement is in the
precision of `sampling.mixed_precision=auto`, and for the baselines in float32 (TF32 on a GPU), as published.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_sampler import ImageSampler, image_inputs, image_orders
from modeling.tokenizers.registry import build_tokenizer
from scripts.benchmarks.baselines import BASELINES, generate_published
from scripts.benchmarks.measure import ceilings, describe, device, interleaved, peak_memory_mb, seconds
from scripts.benchmarks.rounding_ties import FLOAT32_GAP, largest_gap
from scripts.sample_imagenet_rear import sample_chunks
from utils.arguments import natural, positive
from utils.config import load_config
from utils.errors import InputError
from utils.files.npz import write_npz
from utils.precision import matmul_precision
from utils.schema import GeneratorConfig, ModelConfig, SamplingConfig

COMPARED_IMAGES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive, default=768, help="hidden size (reAR-S and -B: 768, -L: 1024)")
    parser.add_argument("--layers", type=positive, default=24, help="blocks (reAR-S: 20, -B and -L: 24)")
    parser.add_argument("--heads", type=positive, help="attention heads; default 16, below a width of 256 4")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[256], help="codes per image, one or more values")
    parser.add_argument("--batch", type=positive, nargs="+", default=[50], help="images per batch, one or more values")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each method")
    parser.add_argument("--baseline-seconds", type=float, default=60, help="limit for each baseline at each setting")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="as in sampling.compile")
    parser.add_argument("--end-to-end", type=natural, default=0, metavar="IMAGES", help="also sample these into an npz")


@matmul_precision(tf32=True)
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all settings. Returns the figures of the last one, and all in `settings`."""
    limits = ceilings()
    print(f"ceilings: {limits['flops'] / 1e12:.3g} TFLOP/s (matrix product), {limits['bytes'] / 1e9:.3g} GB/s (copy)")
    settings = []
    for tokens in arguments.tokens:
        model, config = random_model(arguments.width, arguments.layers, tokens, arguments.heads)
        check_equal(model, config, arguments.compile)
        latency = one_image_seconds(model, config, arguments)
        print(f"N {tokens}: codes equal the baselines' in float32; one image takes {latency:.4g} s")
        for batch in arguments.batch:
            figures = measure(model, config, batch, arguments, limits)
            if arguments.end_to_end:
                figures |= end_to_end(model, config, batch, arguments)
            settings.append({"tokens": tokens, "batch": batch, "latency_s": latency, **figures})
    return {
        "device": device().type,
        "width": arguments.width,
        "layers": arguments.layers,
        **settings[-1],
        "ceiling_tflops": limits["flops"] / 1e12,
        "ceiling_gb_per_s": limits["bytes"] / 1e9,
        "settings": settings,
    }


def random_model(width: int, layers: int, tokens: int, heads: int | None = None) -> tuple[ReAR, GeneratorConfig]:
    config = GeneratorConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads or (16 if width >= 256 else 4),
        intermediate_size=4 * width,
        image_seq_len=tokens,
        transition_alignment=False,
        order="random",
    )
    torch.manual_seed(0)
    model = ReAR(ModelConfig(generator=config)).to(device()).eval().requires_grad_(False)
    for module in model.modules():  # adaLN starts at zero, which would hide the blocks from the comparison
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    return model, config


@matmul_precision(tf32=False)
def check_equal(model: ReAR, config: GeneratorConfig, compile_mode: str) -> None:
    """Raise InputError if a baseline gives other codes, and rounding does not explain it."""
    labels, uniforms = (values.to(device()) for values in image_inputs(range(COMPARED_IMAGES), model, seed=0))
    codes = CodeSampler(model, config, compile_mode=compile_mode)(labels, uniforms)
    for name, baseline in BASELINES.items():
        others = baseline(model, labels, uniforms, config)
        if largest_gap(model, labels, uniforms, codes, others, config) > FLOAT32_GAP:
            differing = (others != codes).sum().item()
            raise InputError(f"{name}: {differing} of {codes.numel()} codes differ from ours, expected 0 but for ties")


def default_sampler(model: ReAR, config: GeneratorConfig, compile_mode: str) -> CodeSampler:
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    return CodeSampler(model, config, dtype, compile_mode)


def one_image_seconds(model: ReAR, config: GeneratorConfig, arguments: argparse.Namespace) -> float:
    """Median time of a batch of one image's codes."""
    sampler = default_sampler(model, config, arguments.compile)
    generate = partial(sampler, *image_inputs([0], model, seed=0))
    generate()
    return statistics.median(interleaved({"ours": generate}, arguments.repeats, budget=60)["ours"])


def measure(
    model: ReAR, config: GeneratorConfig, batch: int, arguments: argparse.Namespace, limits: dict[str, float]
) -> dict[str, Any]:
    """One setting: times of all ways, cold start, memory, and shares of the ceilings."""
    labels, uniforms = image_inputs(range(batch), model, seed=0)
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    sampler = default_sampler(model, config, arguments.compile)
    seconds(partial(sampler, labels, uniforms))
    cold_start, memory = time.perf_counter() - start, peak_memory_mb()
    orders = image_orders(range(batch), config.image_seq_len, SamplingConfig(order="random"))
    in_orders = partial(default_sampler(model, config, arguments.compile), labels, uniforms, orders=orders)
    in_orders()
    ours = partial(sampler, labels, uniforms)
    functions: dict[str, Callable[[], object]] = {"ours": ours, "random_orders": in_orders}
    labels, uniforms = labels.to(device()), uniforms.to(device())
    functions |= {name: partial(baseline, model, labels, uniforms, config) for name, baseline in BASELINES.items()}
    # Warm-up of the baselines; without a cache, a run is long enough to need none.
    generate_published(model, labels, uniforms, config, cached=True)
    times = interleaved(functions, arguments.repeats, arguments.baseline_seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    element_size = 2 if device().type == "cuda" else 4
    work = least_work(config, batch, element_size)
    print(f"N {config.image_seq_len}, batch {batch}: cold start {cold_start:.3g} s, peak memory {memory:.0f} MB")
    for name, values in times.items():
        per_step = describe(values, config.image_seq_len / 1e3)
        print(f"  {name:18} {per_step} ms per step, {batch / medians[name]:.4g} images/s")
    share_of_flops = work.flops / medians["ours"] / limits["flops"]
    share_of_bytes = work.bytes / medians["ours"] / limits["bytes"]
    print(
        f"  at least {work.flops / batch / 1e9:.4g} GFLOP and {work.bytes / batch / 1e9:.4g} GB per image: "
        f"{share_of_flops:.1%} and {share_of_bytes:.1%} of the ceilings"
    )
    return {
        "images_per_s": batch / medians["ours"],
        "ms_per_step": medians["ours"] / config.image_seq_len * 1e3,
        **{f"ratio_{name}": medians[name] / medians["ours"] for name in (*BASELINES, "random_orders")},
        **{f"images_per_s_{name}": batch / medians[name] for name in BASELINES},
        "seconds_ours": medians["ours"],
        "cold_start_s": cold_start,
        "peak_memory_mb": memory,
        "gflop_per_image": work.flops / batch / 1e9,
        "gb_per_image": work.bytes / batch / 1e9,
        "share_of_flops": share_of_flops,
        "share_of_bytes": share_of_bytes,
    }


@dataclass
class Work:
    flops: float
    bytes: float


def least_work(config: GeneratorConfig, batch: int, element_size: int) -> Work:
    """The least work of a batch: matrix products and attention over the used length; weights, read each step, and
    cache. Without activations and adaLN, which is computed once per class and position."""
    d, layers, n, sequences = config.hidden_size, config.num_hidden_layers, config.image_seq_len, 2 * batch
    block = 4 * d * d + 2 * d * config.intermediate_size  # parameters
    positions, lengths = n + 1, (n + 1) * (n + 2) / 2
    head = d * ModelConfig().vq_model.codebook_size
    flops = 2 * layers * sequences * (block * positions + 2 * d * lengths) + 2 * head * batch * n
    return Work(flops, layers * element_size * (block * positions + 2 * d * sequences * lengths) + 4 * head * n)


def end_to_end(model: ReAR, config: GeneratorConfig, batch: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second from labels to a complete npz, with a tokenizer of random weights, after the first batch."""
    blocks = [range(start, start + batch) for start in range(0, max(arguments.end_to_end, 2 * batch), batch)]
    indices = list(range(blocks[-1].stop))
    defaults = load_config(["experiment.output_dir=unused", f"sampling.compile={arguments.compile}"])
    full = replace(defaults, model=replace(defaults.model, generator=config))
    vq_model = replace(defaults.model.vq_model, resolution=16 * round(config.image_seq_len**0.5))
    tokenizer = build_tokenizer(vq_model).to(device()).eval().requires_grad_(False)
    sampler = ImageSampler(model, tokenizer, full, batch)
    finished: list[float] = []  # when each batch was

    def pixels() -> Iterator[np.ndarray]:
        for _, images in sample_chunks(blocks, indices, sampler, full):
            finished.append(time.perf_counter())
            yield images

    with tempfile.TemporaryDirectory() as folder:
        shape = (len(indices), tokenizer.resolution, tokenizer.resolution, 3)
        write_npz(Path(folder) / "samples.npz", {"arr_0": (shape, np.uint8, pixels())})
        duration = time.perf_counter() - finished[0]
    rate = (len(indices) - batch) / duration
    print(f"end to end, batch {batch}: {rate:.4g} images/s after the first batch, npz included")
    return {"end_to_end_images_per_s": rate}
