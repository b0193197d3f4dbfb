"""Speed: the benchmarks of scripts/benchmarks at the sizes of reAR-B, with a roofline of the same run."""

import importlib
import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.sampling.image_sampler import ImageDecoder
from modeling.tokenizers.registry import build_tokenizer
from scripts.benchmarks.measure import ceilings, interleaved, peak_memory_mb
from tests.gpu.checks.conftest import Report
from tests.gpu.checks.made_up import DEVICE, ON_GPU, micro_batch_size
from utils.config import ROOT
from utils.images import to_uint8
from utils.precision import matmul_precision
from utils.schema import VQModelConfig

pytestmark = pytest.mark.gpu


def benchmark(command: str, options: str) -> dict[str, Any]:
    """Figures of `scripts/benchmark.py COMMAND`, which raises if both ways do not compute the same."""
    module, parser = importlib.import_module(f"scripts.benchmarks.{command}"), ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(options.split()))


def test_roofline(report: Report) -> None:
    limits = ceilings()
    kind = "bf16" if ON_GPU else "float32"
    report.figure(f"one large {kind} matrix product, TFLOP/s", limits["flops"] / 1e12)
    report.figure("one large copy, read and written, GB/s", limits["bytes"] / 1e9)


def test_speed_sampling(report: Report) -> None:
    tiny = "--width 32 --layers 2 --tokens 16 --batch 4 --repeats 2 --end-to-end 8"
    real = "--batch 128 --repeats 3 --baseline-seconds 10 --end-to-end 1024"
    found = benchmark("sampling", real if ON_GPU else tiny)
    report.compare("codes of all ways in float32 agree", "yes", "yes", True)
    report.figure("sampling with decoder and npz, images/s", found["end_to_end_images_per_s"], "290 (370)")
    report.figure(f"sampling codes, batch {found['batch']}, images/s", found["images_per_s"])
    report.figure("one image, s", found["latency_s"], "at most 0.25")
    report.figure("the published sampler, images/s", found["images_per_s_no_cache"])
    report.figure("concatenating cache, images/s", found["images_per_s_concat_cache"])
    report.figure("cold start, s", found["cold_start_s"], "at most 45")
    report.figure("sampling, share of the copy's bytes/s", found["share_of_bytes"])
    report.figure("peak memory of sampling, MB", found["peak_memory_mb"])


@torch.inference_mode()
@matmul_precision(tf32=True)
def test_speed_decode(report: Report) -> None:
    """The decoder as sampling uses it, against the tokenizer in float32 on the whole batch."""
    torch.manual_seed(0)
    config, batch = (VQModelConfig(), 50) if ON_GPU else (VQModelConfig(resolution=16, hidden_channels=8), 2)
    tokenizer = build_tokenizer(config).to(DEVICE).eval()
    decoder = ImageDecoder(tokenizer, "truncate", torch.float16 if ON_GPU else torch.float32)
    codes = torch.randint(config.codebook_size, (batch, tokenizer.image_seq_len), device=DEVICE)

    def fast(codes: Tensor) -> np.ndarray:
        return decoder.finish(decoder.start(codes))

    levels = float(np.abs(fast(codes).astype(int) - to_uint8(tokenizer.decode(codes))).mean())
    report.at_most("bytes of the fast decoder from the plain tokenizer's, mean grey levels", levels, 0.15)
    times = interleaved({"ours": partial(fast, codes)}, repeats=5, budget=30)
    report.figure("decoding, images/s", batch / statistics.median(times["ours"]), "900 (1380)")
    report.figure("peak memory of decoding, MB", peak_memory_mb())


def test_speed_training(report: Report) -> None:
    tiny = "--width 32 --layers 2 --heads 4 --tokens 16 --batch 4 --steps 1 --repeats 2 --eager-baseline"
    found = benchmark("training", f"--batch {micro_batch_size()}" if ON_GPU else tiny)
    report.compare("losses and gradients in float32 agree with the published network's", "yes", "yes", True)
    report.figure(f"training, batch {found['batch']}, images/s", found["samples_per_s"], "930")
    report.figure("training the published network, images/s", found["samples_per_s_published"])
    report.figure("training, speed-up over the published network", found["ratio_published"], "1.15 (1.35)")
    report.figure("training, share of the product's FLOP/s", found["mfu"])
    report.figure("peak memory of a training step, MB", found["peak_bytes"] / 1e6)
    report.figure("peak memory of a published step, MB", found["peak_bytes_published"] / 1e6)


def test_prediction(report: Report) -> None:
    """`benchmark.py predict` with this card's ceilings, next to the measured figures of the other parts."""
    if not torch.backends.cuda.is_built():
        report.skip("predictions", "torch is built without CUDA")
        return
    limits = ceilings()
    measured = ["--tflops", str(limits["flops"] / 1e12), "--gb-per-s", str(limits["bytes"] / 1e9)]
    batch = str(micro_batch_size()) if ON_GPU else "4"
    command = [sys.executable, "scripts/benchmark.py", "predict", "--batch", "1", "128", batch]
    command += measured if ON_GPU else ["--parts", "sampling"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # its tensors only pretend to be on a GPU
    result = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=True)
    for row in json.loads(result.stdout.splitlines()[-1])["rows"]:
        report.figure(f"predicted: {row['part']}, batch {row['batch']}, images/s", row["images_per_s"])
