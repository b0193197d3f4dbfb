"""FSDP on two processes: the same numbers as without, resumable, and the same checkpoints."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.runs import NO_DROPOUT, Run, assert_equal_runs
from utils.errors import InputError
from utils.ranks import World
from utils.run import sharding
from utils.run.status import EXIT_PREEMPTED

pytestmark = pytest.mark.multiprocess
ON_CPU = pytest.mark.skipif(not sharding.SHARDS_ON_CPU, reason="this torch shards on GPUs only")


def assert_close(run: Run, oracle: Run) -> None:
    assert run.ids() == oracle.ids()
    torch.testing.assert_close(torch.tensor(run.curves()), torch.tensor(oracle.curves()), rtol=1e-5, atol=1e-5)
    ours, theirs = run.tensors(), oracle.tensors()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_a_torch_that_cannot_shard_on_a_cpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "SHARDS_ON_CPU", False)
    with pytest.raises(InputError, match=r"training\.fsdp=true: torch .* shards on GPUs only, found a CPU"):
        sharding.parallelize(torch.nn.Linear(1, 1), [], World(0, 1, torch.device("cpu")), fsdp=True)


@ON_CPU
def test_sharded_training_resumes_and_equals_replicated_training(
    pair_arguments: list[str], plain_oracle: Run, tmp_path: Path
) -> None:
    arguments = [*pair_arguments, *NO_DROPOUT, "training.fsdp=true"]
    whole = Run(arguments, tmp_path / "whole").completed(processes=2, TEST_SHARDS="1")
    counts = [re.search(r"(\d+) parameters, (\d+) of them here", whole.output(rank)).groups() for rank in range(2)]
    assert sum(int(local) for _, local in counts) == int(counts[0][0])  # each parameter lies in one place only
    assert int(counts[1][1]) > 0
    assert_close(whole, plain_oracle)
    parts = Run(arguments, tmp_path / "parts")
    parts("training.stop_steps=5", processes=2)
    parts.completed(processes=2)
    assert "steps 5 to 12" in parts.log()
    assert_equal_runs(parts, whole)


@ON_CPU
def test_a_run_moves_between_sharded_and_replicated(
    pair_arguments: list[str], plain_oracle: Run, tmp_path: Path
) -> None:
    run = Run([*pair_arguments, *NO_DROPOUT], tmp_path / "run")
    run("training.stop_steps=4", processes=2)
    run(
        "training.stop_steps=8",
        "training.fsdp=true",
        "training.per_gpu_batch_size=2",
        "training.gradient_accumulation_steps=2",
        processes=2,
    )
    run.completed("training.per_gpu_batch_size=8")
    assert_close(run, plain_oracle)


@ON_CPU
def test_a_signal_stops_sharded_training_too(pair_arguments: list[str], tmp_path: Path) -> None:
    run = Run([*pair_arguments, *NO_DROPOUT, "training.fsdp=true"], tmp_path / "run")
    run.start(processes=2, TEST_SLOW="0.2")
    run.wait_for_step(3)
    os.kill(run.processes[1].pid, signal.SIGUSR1)
    assert run.wait() == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert run.status().status == "preempted"
    run.completed(processes=2)
