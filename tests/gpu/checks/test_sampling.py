"""Sampling: CUDA graphs, what an image must not depend on, the decoder in fp16."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.loading import load_tokenizer
from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_sampler import ImageDecoder, image_inputs
from scripts.benchmarks.measure import seconds
from scripts.benchmarks.rounding_ties import BFLOAT16_GAP, FLOAT32_GAP, largest_gap
from tests.gpu.checks.conftest import Report
from tests.gpu.checks.launch import launch
from tests.gpu.checks.made_up import DEVICE, ON_GPU, made_up_model
from utils.config import load_config
from utils.files.weights import save_weights
from utils.precision import matmul_precision
from utils.schema import GeneratorConfig

pytestmark = pytest.mark.gpu
IMAGES = 12
MAX_GREY_LEVELS = 0.15  # mean absolute difference of fp16 from float32


def compare_codes(
    report: Report, what: str, codes: Tensor, others: Tensor, of: tuple[ReAR, GeneratorConfig], bound: float
) -> None:
    """On a CPU they must be equal, on a GPU equal but for ties (scripts/benchmarks/rounding_ties.py)."""
    model, config = of
    images = int((codes != others).any(dim=1).sum())
    if not ON_GPU:
        report.no_difference(what, images, len(codes))
        return
    labels, uniforms = image_inputs(range(len(codes)), model, seed=0)
    gap = largest_gap(model, labels, uniforms, codes, others, config)
    report.at_most(f"{what}: distance from a tie where they differ ({images} of {len(codes)} images)", gap, bound)


@matmul_precision(tf32=False)
def test_graphs(report: Report) -> None:
    if not ON_GPU:
        pytest.skip("CUDA graphs need a GPU")
    model, config = made_up_model()
    inputs = image_inputs(range(IMAGES), model, seed=0)
    raster = torch.arange(config.image_seq_len).expand(IMAGES, -1)
    for dtype, name, bound in ((torch.float32, "float32", FLOAT32_GAP), (torch.bfloat16, "bf16", BFLOAT16_GAP)):
        eager = CodeSampler(model, config, dtype)(*inputs)
        sampler = CodeSampler(model, config, dtype, compile_mode="on")
        report.figure(f"compiling, capturing and a first batch, {name}, s", seconds(partial(sampler, *inputs)))
        codes = sampler(*inputs)
        compare_codes(report, f"codes by graphs and by single launches, {name}", codes, eager, (model, config), bound)
        again = int((sampler(*inputs) != codes).sum())
        report.no_difference(f"codes of the same graphs, run again, {name}", again, codes.numel())
        in_order = sampler(*inputs, orders=raster)
        what = f"codes by graphs, with raster order given and without orders, {name}"
        compare_codes(report, what, in_order, codes, (model, config), bound)


@matmul_precision(tf32=False)
def test_batches(report: Report) -> None:
    model, config = made_up_model()
    sampler = CodeSampler(model, config)
    labels, uniforms = image_inputs(range(IMAGES), model, seed=0)
    whole = sampler(labels, uniforms)
    again = sampler(labels, uniforms)
    report.no_difference(f"codes of a batch of {IMAGES}, sampled again", int((whole != again).sum()), whole.numel())
    for size in (1, 5):
        pieces = [sampler(*batch) for batch in zip(labels.split(size), uniforms.split(size), strict=True)]
        what = f"images of batches of {size} and of {IMAGES}"
        compare_codes(report, what, torch.cat(pieces), whole, (model, config), FLOAT32_GAP)


def test_ranks(report: Report, project: list[str], tmp_path: Path) -> None:
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.manual_seed(0)
    model = ReAR(load_config([*project, "experiment.output_dir=unused"]).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    save_weights(model.state_dict(), tmp_path / "generator.safetensors")
    arguments = [*project, f"experiment.generator_checkpoint={tmp_path / 'generator.safetensors'}"]
    arguments += ["sampling.compile=off", "sampling.num_fid_samples=40", "sampling.per_gpu_batch_size=8"]
    found = []
    for ranks in (1, 2):
        output = tmp_path / f"samples_{ranks}"
        launch("sample_imagenet_rear.py", [*arguments, f"experiment.output_dir={output}"], ranks=ranks)
        with np.load(f"{output}.npz") as arrays:
            found.append(arrays["arr_0"])
    differing = int((found[0] != found[1]).any(axis=(1, 2, 3)).sum())
    report.no_difference("images sampled by one process and by two", differing, len(found[0]))


def test_decoder(report: Report) -> None:
    """With the small tokenizer of this repository, whose weights are trained."""
    config = load_config(["config=configs/rear_blue_marble.yaml", "experiment.output_dir=unused"])
    tokenizer = load_tokenizer(config).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(tokenizer.codebook_size, (8, tokenizer.image_seq_len), generator=generator).to(DEVICE)
    images = []
    for dtype in (torch.float16, torch.float32):
        decoder = ImageDecoder(tokenizer, "round", dtype)
        pending = decoder.start(codes)
        finite = pending.wait()  # if not, `finish` decodes again in float32
        report.compare(f"pixels in {dtype}", "finite" if finite else "not finite", "finite", finite)
        images.append(decoder.finish(pending).astype(float))
    levels = float(np.abs(images[0] - images[1]).mean())
    report.at_most("bytes by fp16 from those by float32, mean grey levels", levels, MAX_GREY_LEVELS)
