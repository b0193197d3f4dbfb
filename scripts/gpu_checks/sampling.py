"""Parts about sampling: CUDA graphs, what an image does not depend on, the decoder in fp16."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_sampler import ImageDecoder, image_inputs
from modeling.tokenizers.registry import load_tokenizer
from scripts import sample_imagenet_rear
from scripts.benchmarks.decode import MAX_GREY_LEVELS
from scripts.benchmarks.measure import device, seconds
from scripts.benchmarks.rounding_ties import BFLOAT16_GAP, FLOAT32_GAP, largest_gap
from scripts.benchmarks.sampling import random_model
from scripts.gpu_checks.findings import Findings, Machine, SkippedError
from scripts.gpu_checks.processes import run_ranks
from scripts.gpu_checks.project import made_up_project
from utils.config import load_config
from utils.files.weights import save_weights
from utils.precision import matmul_precision
from utils.schema import GeneratorConfig

IMAGES = 12


def made_up_model(machine: Machine) -> tuple[ReAR, GeneratorConfig]:
    """reAR-B, or on a CPU a tiny model, with random weights."""
    width, layers, tokens = (768, 24, 256) if machine.gpus else (32, 2, 40)
    return random_model(argparse.Namespace(width=width, layers=layers, heads=None), tokens)


def compare_codes(
    findings: Findings, what: str, codes: Tensor, others: Tensor, of: tuple[ReAR, GeneratorConfig], bound: float
) -> None:
    """Equal but for close calls; on a CPU equal."""
    model, config = of
    images = int((codes != others).any(dim=1).sum())
    if device().type == "cpu":
        findings.no_difference(what, images, len(codes))
        return
    gap = largest_gap(model, *image_inputs(range(len(codes)), model, seed=0), codes, others, config)
    what = f"{what}: distance of a uniform from the edge between two codes, where they part ({images} of {len(codes)})"
    findings.at_most(what, gap, bound)


@matmul_precision(tf32=False)
def graphs(findings: Findings, machine: Machine, work: Path) -> None:
    if machine.gpus == 0:
        raise SkippedError("CUDA graphs need a GPU")
    model, config = made_up_model(machine)
    inputs = image_inputs(range(IMAGES), model, seed=0)
    for dtype, name, bound in ((torch.float32, "float32", FLOAT32_GAP), (torch.bfloat16, "bf16", BFLOAT16_GAP)):
        eager = CodeSampler(model, config, dtype)(*inputs)
        sampler = CodeSampler(model, config, dtype, compile_mode="on")
        findings.figure(f"compiling, capturing and a first batch, {name}, s", seconds(partial(sampler, *inputs)))
        codes = sampler(*inputs)
        compare_codes(findings, f"codes by graphs and by single launches, {name}", codes, eager, (model, config), bound)
        again = int((sampler(*inputs) != codes).sum())
        findings.no_difference(f"codes of the same graphs, run again, {name}", again, codes.numel())
        in_order = sampler(*inputs, orders=torch.arange(config.image_seq_len).expand(IMAGES, -1))
        what = f"codes by graphs that take orders, of raster order, and by those that take none, {name}"
        compare_codes(findings, what, in_order, codes, (model, config), bound)


@matmul_precision(tf32=False)
def batches(findings: Findings, machine: Machine, work: Path) -> None:
    model, config = made_up_model(machine)
    sampler = CodeSampler(model, config)
    labels, uniforms = image_inputs(range(IMAGES), model, seed=0)
    whole = sampler(labels, uniforms)
    again = sampler(labels, uniforms)
    findings.no_difference(f"codes of a batch of {IMAGES}, sampled again", int((whole != again).sum()), whole.numel())
    for size in (1, 5):
        pieces = [sampler(*batch) for batch in zip(labels.split(size), uniforms.split(size), strict=True)]
        what = f"images of batches of {size} and of {IMAGES}"
        compare_codes(findings, what, torch.cat(pieces), whole, (model, config), FLOAT32_GAP)


def ranks(findings: Findings, machine: Machine, work: Path) -> None:
    if machine.gpus == 1:
        raise SkippedError("needs two GPUs")
    arguments = made_up_project(machine, work)
    config = load_config([*arguments, "experiment.output_dir=unused"])
    torch.manual_seed(0)
    model = ReAR(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    save_weights(model.state_dict(), work / "generator.safetensors")
    arguments += [f"experiment.generator_checkpoint={work / 'generator.safetensors'}", "sampling.compile=off"]
    arguments += ["sampling.num_fid_samples=40", "sampling.per_gpu_batch_size=8"]
    found = []
    for processes in (1, 2):
        config = load_config([*arguments, f"experiment.output_dir={work / str(processes)}"])
        run_ranks(sample_imagenet_rear.main, config, ranks=processes)
        with np.load(work / f"{processes}.npz") as arrays:
            found.append(arrays["arr_0"])
    differing = int((found[0] != found[1]).any(axis=(1, 2, 3)).sum())
    findings.no_difference("images sampled by one process and by two", differing, len(found[0]))


def decoder(findings: Findings, machine: Machine, work: Path) -> None:
    """The small tokenizer of this repository, whose weights are trained."""
    config = load_config(["config=configs/rear_blue_marble.yaml", "experiment.output_dir=unused"])
    tokenizer = load_tokenizer(config).to(device())
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(tokenizer.codebook_size, (8, tokenizer.image_seq_len), generator=generator).to(device())
    images = []
    for dtype in (torch.float16, torch.float32):
        image_decoder = ImageDecoder(tokenizer, "round", dtype)
        pending = image_decoder.start(codes)
        finite = pending.wait()  # else `finish` decodes again in float32
        findings.holds(f"pixels in {dtype}", "finite" if finite else "not finite", "finite", finite)
        images.append(image_decoder.finish(pending).astype(float))
    levels = float(np.abs(images[0] - images[1]).mean())
    findings.at_most("bytes by fp16 from those by float32, mean grey levels", levels, MAX_GREY_LEVELS)
