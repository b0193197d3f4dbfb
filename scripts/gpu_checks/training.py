"""Parts that train with scripts/train_rear.py: whole and killed runs, copies to and from a GPU, two ranks, memory."""

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts import train_rear
from scripts.gpu_checks.findings import Findings, Machine, SkippedError
from scripts.gpu_checks.processes import run_ranks, start_ranks
from scripts.gpu_checks.project import made_up_project
from utils.config import load_config
from utils.errors import input_errors_exit
from utils.files.weights import load_state_dict
from utils.run.metrics_file import read_metrics
from utils.run.sharding import SHARDS_ON_CPU
from utils.run.status import EXIT_STATUS
from utils.run.trained_weights import FINAL_FILE

STEPS, SAVED, KILLED = 60, 30, 45
FALL = 0.9  # of the mean loss of the first ten steps
ROUNDING = 1e-2  # relative, of losses in bf16 on a GPU, whose sums have no fixed order
NO_DROPOUT = ("model.generator.dropout=0", "model.generator.attn_drop=0")  # its masks differ between ranks
FLOAT32 = ("training.mixed_precision=no", "training.enable_tf32=false")


def train(arguments: list[str]) -> None:
    with input_errors_exit():
        raise SystemExit(EXIT_STATUS[train_rear.main(load_config(arguments))])


class Run:
    """A training run in `folder`."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.arguments, self.folder = [*arguments, f"experiment.output_dir={folder}"], folder

    def __call__(self, steps: int, *overrides: str, ranks: int = 1) -> "Run":
        run_ranks(train, [*self.arguments, *overrides, f"training.stop_steps={steps}"], ranks=ranks)
        return self

    def kill_at(self, step: int, saved: int, *overrides: str) -> None:
        """Kill it with SIGKILL in that step, when the checkpoint of an earlier one is complete."""
        arguments = [*self.arguments, *overrides]
        (process,) = start_ranks(train, arguments, REAR_FAULT=f"step.{step}:sleep")
        while not ((self.folder / f"checkpoint-{saved}").is_dir() and len(self.rows()) == step):
            if not process.is_alive():
                raise RuntimeError(f"training ended before step {step}")
            time.sleep(0.1)
        process.kill()
        process.join()

    def rows(self) -> list[dict[str, float]]:
        metrics = self.folder / "metrics.jsonl"
        return read_metrics(metrics) if metrics.is_file() else []

    def curve(self, name: str) -> np.ndarray:
        """Values of all steps."""
        return np.array([row[name] for row in self.rows()])

    def starts(self) -> list[int]:
        """The steps from which it was started."""
        lines: list[dict[str, Any]] = [json.loads(x) for x in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if "started" in line]


def largest_relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found / wanted - 1).max()) if len(found) == len(wanted) else float("nan")


def training(findings: Findings, machine: Machine, work: Path) -> None:
    arguments = [*made_up_project(machine, work), f"experiment.generate_every={STEPS}", "training.deterministic=true"]
    whole = Run(arguments, work / "whole")(STEPS)
    losses, rows = whole.curve("train/ar_loss"), whole.rows()
    skipped = int(rows[-1]["train/nonfinite_steps"])
    findings.no_difference(f"{STEPS} steps in bf16: losses and gradients that are not finite", skipped, STEPS)
    what = "cross-entropy of the last ten steps by that of the first ten"
    findings.at_most(what, losses[-10:].mean() / losses[:10].mean(), FALL)
    findings.figure("cross-entropy of the first and of the last step", f"{losses[0]:.4f}, {losses[-1]:.4f}")
    killed = Run(arguments, work / "killed")
    killed.kill_at(KILLED, SAVED, f"experiment.save_every={SAVED}")
    killed(STEPS)
    starts = killed.starts()
    findings.holds("steps that a run started from, killed by SIGKILL", starts, [0, SAVED], starts == [0, SAVED])
    after = [run.curve("train/loss")[SAVED:] for run in (killed, whole)]
    what = f"losses of steps {SAVED + 1} to {STEPS}, resumed from uninterrupted, relative"
    findings.at_most(what, largest_relative(*after), 0)
    weights = [load_state_dict(run.folder / FINAL_FILE) for run in (killed, whole)]
    differing = sum(not torch.equal(weights[0][name], value) for name, value in weights[1].items())
    findings.no_difference("weights at the end, resumed and uninterrupted", differing, len(weights[1]))


def copies(findings: Findings, machine: Machine, work: Path) -> None:
    """Counted under torch's profiler, in steps that log nothing."""
    if machine.gpus == 0:
        raise SkippedError("copies to a GPU need one")
    steps, arguments = 3, [*made_up_project(machine, work), "experiment.log_every=1000"]
    run = Run(arguments, work / "run")(6 + steps, f"training.profile=5:{5 + steps}")
    with gzip.open(run.folder / "profile/trace.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    from_pageable, to_gpu, to_host = (
        sum(f"Memcpy {kind}" in name for name in names) for kind in ("HtoD (Pageable", "HtoD", "DtoH")
    )
    what = f"copies to the GPU that the host waits for, in {steps} steps"
    findings.holds(what, f"{from_pageable} of {to_gpu}", "0 of some", from_pageable == 0 < to_gpu)
    findings.figure("copies to the host, a step", to_host / steps, "1, which says whether to update")


def two_ranks(findings: Findings, machine: Machine, work: Path) -> None:
    if machine.gpus == 1:
        raise SkippedError("needs two GPUs")
    steps, project = 8, made_up_project(machine, work)
    arguments = [*project, *NO_DROPOUT, *FLOAT32, "training.global_batch_size=16", f"experiment.generate_every={steps}"]
    alone = Run(arguments, work / "alone")(steps, "training.per_gpu_batch_size=16")
    for name, override in (("DDP", "training.fsdp=false"), ("FSDP2", "training.fsdp=true")):
        if name == "FSDP2" and not (machine.gpus or SHARDS_ON_CPU):
            findings.skip(name, "this torch shards on GPUs only")
            continue
        both = Run(arguments, work / name)(steps, "training.per_gpu_batch_size=8", override, ranks=2)
        for metric, bound in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
            what = f"{metric} of {steps} steps in float32, {name} on two processes from one process, relative"
            findings.at_most(what, largest_relative(both.curve(metric), alone.curve(metric)), bound)


def memory(findings: Findings, machine: Machine, work: Path) -> None:
    arguments, steps = [*made_up_project(machine, work), "experiment.generate_every=1000"], 4
    runs = [
        Run(arguments, work / checkpointing)(steps, f"model.generator.use_checkpoint={checkpointing}")
        for checkpointing in ("false", "true")
    ]
    plain, checkpointed = (run.curve("train/loss") for run in runs)
    what = "losses with activation checkpointing from those without, relative"
    findings.at_most(what, largest_relative(checkpointed, plain), ROUNDING if machine.gpus else 0)
    if machine.gpus == 0:
        findings.skip("memory with activation checkpointing, by that without", "measured on a GPU only")
        return
    peaks = [float(run.rows()[-1]["perf/memory_gib"]) for run in runs]
    findings.at_most("memory with activation checkpointing, by that without", peaks[1] / peaks[0], 0.9)
    for run, peak, kind in zip(runs, peaks, ("without", "with"), strict=True):
        estimate = re.findall(r"together ([\d.]+)", (run.folder / "log.txt").read_text())[0]
        findings.figure(f"peak memory of training {kind} checkpointing, GiB; estimated", f"{peak:.2f}; {estimate}")
