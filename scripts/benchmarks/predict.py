"""Predict the time of sampling and training on a GPU, on a machine without one.

Kernels, bytes and FLOPs are counted by compiling the product for Hopper (`gpu_counts.py`). A kernel takes its launch
and the longer of two times: that of its bytes at the card's bandwidth, and that of its FLOPs at the card's speed.
Kernels are less efficient than one large copy or product, so real steps take longer.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modeling.sampling.cached_decoding import MODULATED
from scripts.benchmarks.gpu_compiler import GpuCompiler, Launch
from scripts.benchmarks.gpu_counts import (
    Counted,
    count_parameters,
    decode_step,
    fill_modulations,
    optimizer_step,
    train_step,
)
from utils.arguments import positive
from utils.config import ROOT, load_config
from utils.console import markdown_table
from utils.errors import InputError
from utils.files.text import user_path
from utils.schema import Config

BATCHES = (1, 8, 32, 128, 256, 512)
COUNTED = (64, 128)  # images for which launches are counted; bytes and FLOPs are linear in the batch between them
NODE = 8  # GPUs of a machine


@dataclass(frozen=True)
class Card:
    """What a card is assumed to reach in bf16 and in memory bandwidth; none of it is measured by this project."""

    flops: float  # per second, one large matrix product
    bytes: float  # per second, one large copy, read and written
    launch: float = 2e-6  # seconds from one kernel of a CUDA graph to the next
    nvlink: float = 360e9  # bytes per second and direction, that an all-reduce reaches between the GPUs of a machine


CARDS = {
    "h200": Card(flops=790e12, bytes=4.3e12),
    "h100": Card(flops=790e12, bytes=3.0e12),
    "a100": Card(flops=250e12, bytes=1.8e12, nvlink=230e9),
}
NETWORK = 0.9 * 400e9 / 8  # bytes per second and direction of a machine with one 400 Gb/s link


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=user_path, default=ROOT / "configs/rear_b.yaml", help="YAML file of the model")
    parser.add_argument("--gpu", nargs="+", choices=CARDS, default=["h200"], help="one or more cards")
    parser.add_argument("--batch", type=positive, nargs="+", default=list(BATCHES), help="images, one or more values")
    parser.add_argument("--tflops", type=float, help="measured bf16 TFLOP/s, in place of the card's")
    parser.add_argument("--gb-per-s", type=float, help="measured memory bandwidth, in place of the card's")
    parser.add_argument("--launch-us", type=float, help="microseconds per kernel, in place of the card's")
    parser.add_argument("--parts", nargs="+", choices=["sampling", "training"], default=["sampling", "training"])


@dataclass
class Prediction:
    """Of one step; the shares are of its time."""

    launches: float
    gbytes: float
    gflop: float
    ms: float
    launch_share: float
    memory_share: float
    compute_share: float


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        InputError: torch without CUDA support.
    """
    if not torch.backends.cuda.is_built():
        raise InputError(f"torch {torch.__version__}: built without CUDA, expected a CUDA build to compile for a GPU")
    config = load_config([f"config={arguments.config}", "experiment.output_dir=unused"])
    rows: list[dict[str, Any]] = []
    with GpuCompiler() as compiler:
        steps = {part: count_steps(compiler, config, part) for part in arguments.parts}
    for name in arguments.gpu:
        card = measured(CARDS[name], arguments)
        for part in arguments.parts:
            of_part = [row(config, card, name, part, steps[part], batch) for batch in arguments.batch]
            show(f"{part}, {arguments.config.stem}, {name.upper()}", of_part)
            rows += of_part
        if "training" in arguments.parts:
            show(f"training on several {name.upper()}, micro-batch 128", several_gpus(config, card, steps["training"]))
    return {"config": str(arguments.config), "rows": rows}


def measured(card: Card, arguments: argparse.Namespace) -> Card:
    return Card(
        flops=arguments.tflops * 1e12 if arguments.tflops else card.flops,
        bytes=arguments.gb_per_s * 1e9 if arguments.gb_per_s else card.bytes,
        launch=arguments.launch_us * 1e-6 if arguments.launch_us else card.launch,
        nvlink=card.nvlink,
    )


@dataclass
class Steps:
    """Launches, bytes and FLOPs of each kernel of a step, for the two batches `COUNTED`."""

    small: dict[tuple[str, str], tuple[float, float, float]]
    large: dict[tuple[str, str], tuple[float, float, float]]

    def predict(self, batch: int, card: Card) -> Prediction:
        """A step with a batch of any size."""
        launch_s = memory_s = compute_s = moved = flops = count = 0.0
        zero, share = (0.0, 0.0, 0.0), (batch - COUNTED[0]) / (COUNTED[1] - COUNTED[0])
        for kernel in self.small | self.large:
            pairs = zip(self.small.get(kernel, zero), self.large.get(kernel, zero), strict=True)
            times, bytes_, work = (max(0.0, a + share * (b - a)) for a, b in pairs)
            count, moved, flops = count + times, moved + bytes_, flops + work
            launch_s += times * card.launch
            if bytes_ / card.bytes >= work / card.flops:
                memory_s += bytes_ / card.bytes
            else:
                compute_s += work / card.flops
        total = launch_s + memory_s + compute_s
        return Prediction(
            launches=round(count),
            gbytes=moved / 1e9,
            gflop=flops / 1e9,
            ms=total * 1e3,
            launch_share=launch_s / total,
            memory_share=memory_s / total,
            compute_share=compute_s / total,
        )


def count_steps(compiler: GpuCompiler, config: Config, part: str) -> Steps:
    small, large = (totals(step_launches(compiler, config, part, images)) for images in COUNTED)
    return Steps(small, large)


def step_launches(compiler: GpuCompiler, config: Config, part: str, images: int) -> list[tuple[Launch, float]]:
    """Launches, and how often each runs in a step."""
    if part == "training":
        once = [(launch, 1.0) for launch in optimizer_step(config)]
        return of_all_blocks(train_step(compiler, config, images), config) + once
    guided = (config.model.generator.guidance_scale or 1) != 1
    step = of_all_blocks(decode_step(compiler, config, images, guided), config)
    filled = of_all_blocks(fill_modulations(compiler, config, images, guided), config)
    return step + [(launch, times / MODULATED) for launch, times in filled]


def totals(launches: Sequence[tuple[Launch, float]]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Launches, bytes and FLOPs of each kernel."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for launch, times in launches:
        key = launch.kind, launch.name
        count, moved, flops = found.get(key, (0.0, 0.0, 0.0))
        found[key] = count + times, moved + times * launch.bytes, flops + times * launch.flops
    return found


def of_all_blocks(counted: Counted, config: Config) -> list[tuple[Launch, float]]:
    more = config.model.generator.num_hidden_layers - counted.blocks
    return [(launch, 1.0) for launch in counted.launches] + [(launch, float(more)) for launch in counted.per_block]


def row(config: Config, card: Card, name: str, part: str, steps: Steps, batch: int) -> dict[str, Any]:
    step = steps.predict(batch, card)
    images = batch / step.ms * 1e3 / (config.model.generator.image_seq_len if part == "sampling" else 1)
    return {"gpu": name, "part": part, "batch": batch, **asdict(step), "images_per_s": images}


def several_gpus(config: Config, card: Card, steps: Steps, micro_batch: int = 128) -> list[dict[str, Any]]:
    """Time of a step on 8 GPUs of one machine, and on 4 such machines. DDP all-reduces the gradients in float32, during
    the backward pass (two thirds of the step) but for the last bucket of 25 MB; FSDP2 gathers the parameters of a block
    in bf16 twice, and reduces its gradients in float32, next to the computation."""
    parameters = count_parameters(config)
    step = steps.predict(micro_batch, card).ms
    rows = []
    for gpus in (1, NODE, 4 * NODE):
        ddp = reduction_ms(4 * parameters, gpus, card)
        fsdp = reduction_ms(4 * parameters, gpus, card) / 2 + reduction_ms(2 * parameters, gpus, card)
        exposed = max(ddp - step * 2 / 3, reduction_ms(25e6, gpus, card))
        exposed_fsdp = max(fsdp - step, 0) + fsdp / config.model.generator.num_hidden_layers
        for way, communication, waits in (("DDP", ddp, exposed), ("FSDP2", fsdp, exposed_fsdp)):
            total = step + waits
            rows.append(
                {
                    "GPUs": gpus,
                    "way": way,
                    "communication_ms": communication,
                    "exposed_ms": waits,
                    "ms": total,
                    "images_per_s": gpus * micro_batch / total * 1e3,
                    "efficiency": step / total,
                }
            )
    return rows


def reduction_ms(size: float, gpus: int, card: Card) -> float:
    """All-reduce of `size` bytes: rings within each machine, then between the machines."""
    if gpus == 1:
        return 0.0
    within = 2 * (NODE - 1) / NODE * size / card.nvlink
    machines = gpus // NODE
    between = 2 * (machines - 1) / machines * size / NETWORK
    return (within + between) * 1e3


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    hidden = {"gpu", "part"}
    header = [key for key in rows[0] if key not in hidden]
    cells = [[f"{v:.4g}" if isinstance(v := row[key], float) else str(v) for key in header] for row in rows]
    print(f"\n{title}\n\n{markdown_table(header, cells)}")
