"""Sampling codes: `modeling.sampling.generate`, also in random orders, against no cache and concatenating caches
(`baselines.py`), which know raster order only.

Random weights: the time does not depend on them. The gate before it is in float32, the measurement in the precision of
`sampling.mixed_precision=auto`; the baselines run in float32 (TF32 on a GPU), as they are published.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.rear import ReAR
from modeling.sampling.cached_decoding import DecodingState
from modeling.sampling.generate import CodeSampler, next_codes
from modeling.sampling.image_sampler import ImageSampler, class_labels_of, image_inputs, image_orders
from modeling.tokenizers.registry import build_tokenizer
from scripts.benchmarks.baselines import generate_concatenating, generate_lean_concatenating, generate_no_cache
from scripts.benchmarks.measure import ceilings, describe, device, interleaved, peak_memory_mb, seconds
from scripts.benchmarks.rounding_ties import FLOAT32_GAP, largest_gap
from scripts.sample_imagenet_rear import pack, sample_blocks
from utils.config import load_config
from utils.errors import InputError
from utils.files.sample_chunks import ChunkWriter, SampleChunks
from utils.precision import matmul_precision
from utils.schema import Config, GeneratorConfig, ModelConfig, SamplingConfig

GATE_IMAGES = 4
BASELINES = {
    "no_cache": generate_no_cache,
    "concat_cache": generate_concatenating,
    "lean_concat_cache": generate_lean_concatenating,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=768, help="hidden size (reAR-S and -B: 768, -L: 1024)")
    parser.add_argument("--layers", type=int, default=24, help="blocks (reAR-S: 20, -B and -L: 24)")
    parser.add_argument("--heads", type=int, help="attention heads; default 16, below a width of 256 4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="codes per image, one or more values")
    parser.add_argument("--batch", type=int, nargs="+", default=[50], help="images per batch, one or more values")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way")
    parser.add_argument("--baseline-seconds", type=float, default=60, help="limit for each baseline at each setting")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="as in sampling.compile")
    parser.add_argument("--end-to-end", type=int, default=0, metavar="IMAGES", help="also sample so many into an npz")


@matmul_precision(tf32=True)
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all settings; the figures are those of the last one, all are under `settings`."""
    limits = ceilings()
    print(f"ceilings: {limits['flops'] / 1e12:.3g} TFLOP/s (matrix product), {limits['bytes'] / 1e9:.3g} GB/s (copy)")
    settings = []
    for tokens in arguments.tokens:
        model, config = random_model(arguments, tokens)
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


def random_model(arguments: argparse.Namespace, tokens: int) -> tuple[ReAR, GeneratorConfig]:
    config = GeneratorConfig(
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads or (16 if arguments.width >= 256 else 4),
        intermediate_size=4 * arguments.width,
        image_seq_len=tokens,
        transition_alignment=False,
        order="random",
    )
    torch.manual_seed(0)
    model = ReAR(ModelConfig(generator=config)).to(device()).eval().requires_grad_(False)
    for module in model.modules():  # no adaLN of zeros, which would hide the blocks from the gate
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    return model, config


@matmul_precision(tf32=False)
def check_equal(model: ReAR, config: GeneratorConfig, compile_mode: str) -> None:
    """
    Raises:
        InputError: other codes than a baseline's, which rounding does not explain.
    """
    labels, uniforms = (values.to(device()) for values in image_inputs(range(GATE_IMAGES), model, seed=0))
    codes = CodeSampler(model, config, compile_mode=compile_mode)(labels, uniforms)
    for name, baseline in BASELINES.items():
        others = baseline(model, labels, uniforms, config)
        differing = (others != codes).sum().item()
        if largest_gap(model, labels, uniforms, codes, others, config) > FLOAT32_GAP:
            raise InputError(
                f"gate: {differing} of {codes.numel()} codes differ from {name}, expected 0 or close calls"
            )


def default_sampler(model: ReAR, config: GeneratorConfig, compile_mode: str) -> CodeSampler:
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    return CodeSampler(model, config, dtype, compile_mode)


def one_image_seconds(model: ReAR, config: GeneratorConfig, arguments: argparse.Namespace) -> float:
    """Median time of a batch of one image's codes."""
    sampler = default_sampler(model, config, arguments.compile)
    generate = partial(sampler, *image_inputs([0], model, seed=0))
    generate()
    return statistics.median(interleaved({"": generate}, arguments.repeats, budget=60)[""])


def measure(
    model: ReAR, config: GeneratorConfig, batch: int, arguments: argparse.Namespace, limits: dict[str, float]
) -> dict[str, Any]:
    """One setting: times of all ways, cold start, memory, and shares of the ceilings."""
    inputs = image_inputs(range(batch), model, seed=0)
    labels, uniforms = (values.to(device()) for values in inputs)
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    sampler = default_sampler(model, config, arguments.compile)
    seconds(partial(sampler, *inputs))
    cold_start, memory = time.perf_counter() - start, peak_memory_mb()
    orders = image_orders(range(batch), config.image_seq_len, SamplingConfig(order="random"))
    in_orders = partial(default_sampler(model, config, arguments.compile), *inputs, orders=orders)
    in_orders()
    functions: dict[str, Callable[[], object]] = {"ours": partial(sampler, *inputs), "random_orders": in_orders}
    functions |= {name: partial(baseline, model, labels, uniforms, config) for name, baseline in BASELINES.items()}
    cpu_start = time.process_time()
    functions["ours"]()
    cpu_seconds = time.process_time() - cpu_start
    generate_concatenating(model, labels, uniforms, config)  # warm-up; the first run of "no cache" is among its repeats
    times = interleaved(functions, arguments.repeats, arguments.baseline_seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    work, operations = step_work(config, batch, torch.finfo(sampler.dtype).bits // 8), step_operations(sampler)
    print(f"N {config.image_seq_len}, batch {batch}: cold start {cold_start:.3g} s, peak memory {memory:.0f} MB")
    for name, values in times.items():
        print(f"  {name:18} {describe(values, config.image_seq_len / 1e3)} ms per step, "
              f"{batch / medians[name]:.4g} images/s")  # fmt: skip
    print(
        f"  at least {work.flops / batch / 1e9:.4g} GFLOP and {work.bytes / batch / 1e9:.4g} GB per image: "
        f"{work.flops / medians['ours'] / limits['flops']:.1%} and "
        f"{work.bytes / medians['ours'] / limits['bytes']:.1%} of the ceilings; "
        f"per step {work.bytes / (config.image_seq_len + 1) / 1e6:.4g} MB on average and "
        f"{operations.number} operations, attention by {operations.attention}"
    )
    return {
        "images_per_s": batch / medians["ours"],
        "ms_per_step": medians["ours"] / config.image_seq_len * 1e3,
        **{f"ratio_{name}": medians[name] / medians["ours"] for name in (*BASELINES, "random_orders")},
        **{f"images_per_s_{name}": batch / medians[name] for name in BASELINES},
        "seconds_ours": medians["ours"],
        "cpu_seconds": cpu_seconds,
        "cold_start_s": cold_start,
        "peak_memory_mb": memory,
        "gflop_per_image": work.flops / batch / 1e9,
        "gb_per_image": work.bytes / batch / 1e9,
        **{"operations_per_step": operations.number, "attention": operations.attention},
        "share_of_flops": work.flops / medians["ours"] / limits["flops"],
        "share_of_bytes": work.bytes / medians["ours"] / limits["bytes"],
    }


class CountOperations(TorchDispatchMode):
    """Of torch, inside `with`; each that is no view is a kernel at least, which compiling joins and a graph launches at
    once."""

    number = 0
    attention = "matrix products"  # or the kernel that torch chose

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.number += not func.is_view
        if "attention" in func.__name__:
            self.attention = func.__name__
        return func(*args, **(kwargs or {}))


def step_operations(sampler: CodeSampler) -> CountOperations:
    """Of a decode step that is neither compiled nor in a graph, but masked where a graph would be."""
    state = DecodingState(sampler.model, 1, sampler.guided, sampler.dtype)
    state.position.fill_(2)
    with torch.inference_mode(), CountOperations() as operations:
        next_codes(state, sampler.scales, sampler.config, end=3, masked=device().type == "cuda")
    return operations


@dataclass
class Work:
    flops: float
    bytes: float


def step_work(config: GeneratorConfig, batch: int, itemsize: int) -> Work:
    """What a batch needs at least: matrix products and attention; weights, read each step, and cache, over the used
    length. Without adaLN, which is computed once per class and position, and activations."""
    d, layers, n, streams = config.hidden_size, config.num_hidden_layers, config.image_seq_len, 2 * batch
    block = 4 * d * d + 2 * d * config.intermediate_size  # parameters
    positions, lengths = n + 1, (n + 1) * (n + 2) / 2
    head = d * ModelConfig().vq_model.codebook_size
    flops = 2 * layers * streams * (block * positions + 2 * d * lengths) + 2 * head * batch * n
    return Work(flops, layers * itemsize * (block * positions + 2 * d * streams * lengths) + 4 * head * n)


def end_to_end(model: ReAR, config: GeneratorConfig, batch: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second from codes to a finished npz, with a tokenizer of random weights, after the first batch."""
    images = max(arguments.end_to_end, 2 * batch)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "samples"
        defaults = load_config([f"experiment.output_dir={output}", f"sampling.compile={arguments.compile}"])
        sampling = replace(defaults.sampling, num_fid_samples=images, per_gpu_batch_size=batch)
        vq_model = replace(defaults.model.vq_model, resolution=16 * round(config.image_seq_len**0.5))
        full: Config = replace(defaults, sampling=sampling, model=replace(defaults.model, generator=config))
        tokenizer = build_tokenizer(vq_model).to(device()).eval().requires_grad_(False)
        parts = SampleChunks(output.with_name("samples.parts"), images, batch)
        parts.claim({})
        first_second: list[float] = []
        sampler, indices = ImageSampler(model, tokenizer, full, len(parts.blocks[0]), print), list(range(images))
        with ChunkWriter(parts, output, save_png=False) as writer:
            for block, pixels in sample_blocks(parts.blocks, indices, sampler, full):
                first_second.append(time.perf_counter())
                writer.write(block, pixels)
        pack(parts, output, full, class_labels_of(indices, model.num_classes), fingerprint={}, figures={})
        duration = time.perf_counter() - first_second[0]
    rate = (images - len(parts.blocks[0])) / duration
    print(f"end to end, batch {batch}: {rate:.4g} images/s after the first batch, npz included")
    return {"end_to_end_images_per_s": rate}
