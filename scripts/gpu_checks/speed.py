"""Parts that measure: the benchmarks of scripts/benchmarks, with a roofline of the same run, beside the goals."""

import importlib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from scripts.benchmarks.measure import ceilings
from scripts.gpu_checks.findings import Findings, Machine
from scripts.gpu_checks.project import batch_size


def benchmark(command: str, options: str) -> dict[str, Any]:
    """What it measures; its gate raises, and the part fails, where what is measured computes something else."""
    module, parser = importlib.import_module(f"scripts.benchmarks.{command}"), ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(options.split()))


def roofline(findings: Findings, machine: Machine, work: Path) -> None:
    limits = ceilings()
    kind = "bf16" if machine.gpus else "float32"
    findings.figure(f"one large {kind} matrix product, TFLOP/s", limits["flops"] / 1e12)
    findings.figure("one large copy, read and written, GB/s", limits["bytes"] / 1e9)


def sampling(findings: Findings, machine: Machine, work: Path) -> None:
    tiny = "--width 32 --layers 2 --tokens 16 --batch 4 --repeats 2 --end-to-end 8"
    real = "--batch 128 --repeats 3 --baseline-seconds 10 --end-to-end 1024"
    found = benchmark("sampling", real if machine.gpus else tiny)
    findings.holds("codes of all ways in float32 agree", "yes", "yes", True)
    of = f"batch {found['batch']}"
    findings.figure("sampling with decoder and npz, images/s", found["end_to_end_images_per_s"], "290 (370)")
    findings.figure(f"sampling codes, {of}, images/s", found["images_per_s"])
    findings.figure("one image, s", found["latency_s"], "at most 0.25")
    findings.figure("the published sampler's way, images/s", found["images_per_s_no_cache"])
    findings.figure("concatenating cache, images/s", found["images_per_s_concat_cache"])
    findings.figure("cold start, s", found["cold_start_s"], "at most 45")
    findings.figure("sampling, share of the copy's bytes/s", found["share_of_bytes"])
    findings.figure("peak memory of sampling, MB", found["peak_memory_mb"])


def decode(findings: Findings, machine: Machine, work: Path) -> None:
    found = benchmark("decode", "" if machine.gpus else "--resolution 16 --channels 8 --batch 2 --repeats 2")
    findings.at_most("as fast decoding is, from the plain tokenizer, mean grey levels", found["grey_levels"], 0.15)
    findings.figure("decoding, images/s", found["images_per_s"], "900 (1380)")
    findings.figure("decoding, share of the product's FLOP/s", found["share_of_flops"])
    findings.figure("peak memory of decoding, MB", found["peak_memory_mb"])


def training(findings: Findings, machine: Machine, work: Path) -> None:
    tiny = "--width 32 --layers 2 --heads 4 --tokens 16 --batch 4 --steps 1 --repeats 2 --eager-baseline"
    found = benchmark("training", f"--batch {batch_size(machine)}" if machine.gpus else tiny)
    findings.holds("losses and gradients in float32 agree with the published modules'", "yes", "yes", True)
    findings.figure(f"training, batch {found['batch']}, images/s", found["samples_per_s"], "930")
    findings.figure("training, the published modules, images/s", found["samples_per_s_published"])
    findings.figure("training, times the published modules' speed", found["ratio_published"], "1.15 (1.35)")
    findings.figure("training, share of the product's FLOP/s", found["mfu"])
    findings.figure("peak memory of a training step, MB", found["peak_bytes"] / 1e6)
    findings.figure("peak memory of a published step, MB", found["peak_bytes_published"] / 1e6)
