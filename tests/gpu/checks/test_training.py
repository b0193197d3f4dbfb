"""Training by scripts/train_rear.py: whole and killed runs, copies to and from the GPU, two ranks, memory."""

import gzip
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu.checks.conftest import Report
from tests.gpu.checks.launch import launch, start
from tests.gpu.checks.made_up import ON_GPU
from utils.files.weights import load_state_dict
from utils.run.metrics_file import read_metrics
from utils.run.sharding import SHARDS_ON_CPU

pytestmark = pytest.mark.gpu
STEPS, SAVED, KILLED = 60, 30, 45
LOSS_RATIO = 0.9  # mean loss of the last ten steps divided by that of the first ten
ROUNDING = 1e-2  # relative, of losses in bf16 on a GPU, whose sums have no fixed order
NO_DROPOUT = ("model.generator.dropout=0", "model.generator.attn_drop=0")  # dropout masks differ between ranks
FLOAT32 = ("training.mixed_precision=no", "training.enable_tf32=false")


class Run:
    """A training run in `folder`."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.arguments = [*arguments, f"experiment.output_dir={folder}"]
        self.folder = folder

    def train(self, steps: int, *overrides: str, ranks: int = 1) -> None:
        launch("train_rear.py", [*self.arguments, *overrides, f"training.stop_steps={steps}"], ranks=ranks)

    def train_and_kill(self, step: int, saved: int, *overrides: str) -> None:
        """Kill it with SIGKILL in `step`, when the checkpoint of the earlier step `saved` is complete."""
        process = start("train_rear.py", [*self.arguments, *overrides], REAR_FAULT=f"step.{step}:sleep")
        while not ((self.folder / f"checkpoint-{saved}").is_dir() and len(self.rows()) == step):
            assert process.poll() is None, f"training ended before step {step}"
            time.sleep(0.1)
        process.kill()
        process.wait()

    def rows(self) -> list[dict[str, float]]:
        metrics = self.folder / "metrics.jsonl"
        return read_metrics(metrics) if metrics.is_file() else []

    def curve(self, name: str) -> np.ndarray:
        """Values of all steps."""
        return np.array([row[name] for row in self.rows()])

    def starts(self) -> list[int]:
        """Steps at which the run was started or resumed."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if "started" in line]


def largest_relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found / expected - 1).max()) if len(found) == len(expected) else float("nan")


def test_training(report: Report, project: list[str], tmp_path: Path) -> None:
    arguments = [*project, f"experiment.generate_every={STEPS}", "training.deterministic=true"]
    whole = Run(arguments, tmp_path / "whole")
    whole.train(STEPS)
    losses, rows = whole.curve("train/ar_loss"), whole.rows()
    skipped = int(rows[-1]["train/nonfinite_steps"])
    report.compare("steps in bf16 whose loss or gradient is not finite", f"{skipped} of {STEPS}", 0, skipped == 0)
    ratio = losses[-10:].mean() / losses[:10].mean()
    report.at_most("cross-entropy of the last ten steps by that of the first ten", ratio, LOSS_RATIO)
    report.figure("cross-entropy of the first and of the last step", f"{losses[0]:.4f}, {losses[-1]:.4f}")

    killed = Run(arguments, tmp_path / "killed")
    killed.train_and_kill(KILLED, SAVED, f"experiment.save_every={SAVED}")
    killed.train(STEPS)
    starts = killed.starts()
    report.compare("steps from which a run killed by SIGKILL started", starts, [0, SAVED], starts == [0, SAVED])
    resumed, uninterrupted = killed.curve("train/loss")[SAVED:], whole.curve("train/loss")[SAVED:]
    what = f"losses of steps {SAVED + 1} to {STEPS}, resumed from uninterrupted, relative"
    report.at_most(what, largest_relative(resumed, uninterrupted), 0)
    found, expected = (load_state_dict(run.folder / "model.safetensors") for run in (killed, whole))
    differing = sum(not torch.equal(found[name], value) for name, value in expected.items())
    report.no_difference("weights at the end, resumed and uninterrupted", differing, len(expected))


def test_copies(report: Report, project: list[str], tmp_path: Path) -> None:
    """Counted under torch's profiler, in steps that log nothing."""
    if not ON_GPU:
        pytest.skip("copies to a GPU need one")
    steps, run = 3, Run([*project, "experiment.log_every=1000"], tmp_path / "run")
    run.train(6 + steps, f"training.profile=5:{5 + steps}")
    compare_copies(report, run.folder / "profile/trace.json.gz", steps)


def compare_copies(report: Report, trace: Path, steps: int) -> None:
    with gzip.open(trace, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    from_pageable = sum("Memcpy HtoD (Pageable" in name for name in names)  # the host waits for these
    to_gpu = sum("Memcpy HtoD" in name for name in names)
    to_host = sum("Memcpy DtoH" in name for name in names)
    passed = from_pageable == 0 < to_gpu
    what = f"copies to the GPU that the host waits for, in {steps} steps"
    report.compare(what, f"{from_pageable} of {to_gpu}", "0 of at least 1", passed)
    report.figure("copies to the host per step", to_host / steps, "1, whether the update is finite")


def test_two_ranks(report: Report, project: list[str], tmp_path: Path) -> None:
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    steps = 8
    arguments = [*project, *NO_DROPOUT, *FLOAT32, "training.global_batch_size=16"]
    alone = Run(arguments, tmp_path / "alone")
    alone.train(steps, "training.per_gpu_batch_size=16")
    for name, override in (("DDP", "training.fsdp=false"), ("FSDP2", "training.fsdp=true")):
        if name == "FSDP2" and not (ON_GPU or SHARDS_ON_CPU):
            report.skip(name, "this torch shards on GPUs only")
            continue
        both = Run(arguments, tmp_path / name)
        both.train(steps, "training.per_gpu_batch_size=8", override, ranks=2)
        for metric, bound in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
            what = f"{metric} of {steps} steps in float32, {name} on two processes from one process, relative"
            report.at_most(what, largest_relative(both.curve(metric), alone.curve(metric)), bound)


def test_memory(report: Report, project: list[str], tmp_path: Path) -> None:
    runs = {}
    for checkpointing in ("false", "true"):
        runs[checkpointing] = Run(project, tmp_path / checkpointing)
        runs[checkpointing].train(4, f"model.generator.use_checkpoint={checkpointing}")
    difference = largest_relative(runs["true"].curve("train/loss"), runs["false"].curve("train/loss"))
    what = "losses with activation checkpointing from those without, relative"
    report.at_most(what, difference, ROUNDING if ON_GPU else 0)
    if not ON_GPU:
        report.skip("memory with activation checkpointing by that without", "measured on a GPU only")
        return
    peaks = {}
    for checkpointing, run in runs.items():
        peaks[checkpointing] = float(run.rows()[-1]["perf/memory_gib"])
        estimate = re.findall(r"together ([\d.]+)", (run.folder / "log.txt").read_text())[0]
        name = f"peak memory of training with use_checkpoint={checkpointing}, GiB; estimated"
        report.figure(name, f"{peaks[checkpointing]:.2f}; {estimate}")
    report.at_most("memory with activation checkpointing by that without", peaks["true"] / peaks["false"], 0.9)
