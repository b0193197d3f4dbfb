"""Runs in other orders than raster: killed and resumed, on one process and on two, and with no random orders."""

import signal
from pathlib import Path

import pytest
import torch

from tests.faults.runs import Run, assert_equal_runs

ANNEALED = ["model.generator.order=annealed", "model.generator.order_anneal_start=3"]


def test_a_random_order_ratio_of_0_gives_the_bits_of_raster_order(oracle: Run, tmp_path: Path) -> None:
    run = Run([*oracle.arguments[:-1], *ANNEALED, "model.generator.order_anneal_end=0"], tmp_path / "run").completed()
    assert_equal_runs(run, oracle)


@pytest.mark.multiprocess
def test_killed_on_one_process_and_continued_on_two(plain_oracle: Run, tmp_path: Path) -> None:
    arguments = [*plain_oracle.arguments[:-1], *ANNEALED, "model.generator.order_anneal_end=11"]
    whole, run, pair = (Run(arguments, tmp_path / name) for name in ("whole", "run", "pair"))
    whole.completed()
    assert whole.curves()[0] != plain_oracle.curves()[0]
    assert run(REAR_FAULT="save.begin.8") == [-signal.SIGKILL]
    run.completed()
    assert "steps 4 to 12" in run.log()
    assert_equal_runs(run, whole)
    pair("training.stop_steps=4")
    pair.completed("training.per_gpu_batch_size=4", processes=2)
    assert pair.ids() == whole.ids()
    torch.testing.assert_close(torch.tensor(pair.curves()), torch.tensor(whole.curves()), rtol=1e-5, atol=1e-5)
