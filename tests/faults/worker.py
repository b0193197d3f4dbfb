"""One rank of a training run under observation: records the samples it consumes, and can be slowed down or get NaN.

Started by `tests.faults.runs` from a server that has the imports done already, or by torchrun as a script. Environment:
TEST_RECORD: file that gets a line {step, rank, ids, dropout} per micro-batch; TEST_SLOW: seconds per step; TEST_POISON:
`<step>@<rank>` or `<step>+@<rank>` (from that step on): the loss is NaN there; TEST_HOLD: step that lasts until a stop
signal comes; TEST_SIGNAL_IN_SAVE: a SIGTERM comes while a checkpoint is written; TEST_CWD: working folder, with {rank};
TEST_SHARDS: print how many parameters this rank holds.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from scripts import train_rear
from utils.config import load_config
from utils.errors import input_errors_exit
from utils.run import checkpoint, training_run
from utils.run.signals import StopSignals
from utils.run.status import EXIT_PREEMPTED


def observe() -> None:
    """Wrap the hooks that the trainer has anyway: the fault point of a step and `training_step`."""
    rank, at = int(os.environ.get("RANK", 0)), {"step": -1}
    original_fault_point, original_step = training_run.fault_point, train_rear.training_step
    poison, _, poisoned_rank = os.environ.get("TEST_POISON", "").partition("@")

    received, original_receive = threading.Event(), StopSignals._receive

    def receive(signals: StopSignals, *of_signal: Any) -> None:
        original_receive(signals, *of_signal)
        received.set()

    StopSignals._receive = receive

    def fault_point(name: str, step: int) -> None:
        at["step"] = step
        if step == int(os.environ.get("TEST_HOLD", -1)):
            received.wait()
        time.sleep(float(os.environ.get("TEST_SLOW", 0)))
        original_fault_point(name, step)

    def training_step(model, tokenizer, batch, **rest):
        if "TEST_RECORD" in os.environ:
            line = json.dumps(
                {"step": at["step"], "rank": rank, "ids": batch["index"].tolist(), "dropout": torch.initial_seed()}
            )
            with Path(os.environ["TEST_RECORD"]).open("a") as file:
                file.write(line + "\n")
        terms = original_step(model, tokenizer, batch, **rest)
        if poison and int(poisoned_rank) == rank:
            reached = at["step"] >= int(poison[:-1]) if poison.endswith("+") else at["step"] == int(poison)
            if reached:
                terms.loss = terms.loss * float("nan")
        return terms

    training_run.fault_point, train_rear.training_step = fault_point, training_step
    if "TEST_SHARDS" in os.environ:
        original_optimizers = train_rear.build_optimizers

        def build_optimizers(model, config):
            parameters = list(model.parameters())
            local = sum(p.to_local().numel() for p in parameters)
            print(f"{sum(p.numel() for p in parameters)} parameters, {local} of them here", flush=True)
            return original_optimizers(model, config)

        train_rear.build_optimizers = build_optimizers
    if "TEST_SIGNAL_IN_SAVE" in os.environ:
        original_manifest = checkpoint.write_manifest

        def write_manifest(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            original_manifest(*arguments)

        checkpoint.write_manifest = write_manifest


def train(arguments: list[str]) -> None:
    """Exit as the script does."""
    torch.set_num_threads(1)
    observe()
    with input_errors_exit():
        if train_rear.main(load_config(arguments)) == "preempted":
            raise SystemExit(EXIT_PREEMPTED)


def train_in_child(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """As a process of its own: environment and output are those of a launched script."""
    multiprocessing.set_start_method("fork", force=True)  # as in a script on Linux, for the data loader's workers
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background, or under nohup, ignores them
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(os.environ.get("TEST_CWD", ".").format(rank=os.environ.get("RANK")))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    train(arguments)


if __name__ == "__main__":
    train(sys.argv[1:])
