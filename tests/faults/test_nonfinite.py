"""Row 19 of the fault matrix: a loss that is NaN."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.runs import Run
from tests.faults.test_saving import tiny_snapshot, write
from utils.errors import InputError
from utils.run.checkpoint import list_checkpoints, write_checkpoint
from utils.run.manifest import Provenance, TrainingState, read_manifest
from utils.run.metrics_file import read_metrics

EVERY_STEP = ["experiment.save_every=1", "experiment.keep_every=1", "training.use_ema=true"]


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    folder = run.folder / f"checkpoint-{step}"
    model = load_file(folder / "model.safetensors")
    optimizer = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{name} {key}": value for name, state in optimizer.items() for key, value in state.items()}
    return model | {f"ema {key}": value for key, value in load_file(folder / "ema.safetensors").items()} | moments


@pytest.mark.multiprocess
def test_row_19_one_rank_is_skipped_on_all(pair: Run) -> None:
    pair.completed(*EVERY_STEP, processes=2, TEST_POISON="6@1")
    before, after, later = (weights(pair, step) for step in (6, 7, 8))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(after["lm_head.weight"], later["lm_head.weight"])
    assert all(torch.isfinite(value).all() for value in later.values())
    assert [row["train/nonfinite_steps"] for row in read_metrics(pair.folder / "metrics.jsonl")] == [0] * 6 + [1] * 6
    assert read_manifest(pair.folder / "checkpoint-12").state.nonfinite_steps == 1
    assert pair.log().count("loss or gradient not finite, update skipped (1 in a row)") == 1


@pytest.mark.multiprocess
def test_row_19_too_many_in_a_row_end_the_run_on_all_ranks(pair: Run) -> None:
    assert pair("training.max_nonfinite_steps=3", processes=2, TEST_POISON="6+@1") == [1, 1]
    message = "step 8: loss or gradient not finite for 3 steps in a row (training.max_nonfinite_steps=3); "
    assert f"{message}the last good checkpoint is {pair.folder / 'checkpoint-8'}" in pair.output(0)
    assert message in pair.output(1)
    assert pair.status().status == "failed"
    assert pair.checkpoints() == ["checkpoint-4", "checkpoint-8"]
    saved = load_file(pair.folder / "checkpoint-8/model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    pair.completed("experiment.resume=true", processes=2)


def test_row_19_the_count_survives_a_restart(run: Run) -> None:
    assert run("training.stop_steps=6", TEST_POISON="5@0") == [0]
    run.completed()
    assert read_manifest(run.folder / "checkpoint-12").state.nonfinite_steps == 1


def test_row_19_a_restart_of_a_run_with_a_skipped_step_equals_it(run: Run, tmp_path: Path) -> None:
    whole = Run(run.arguments[:-1], tmp_path / "whole")
    whole.completed(TEST_POISON="5@0")
    run("training.stop_steps=7", TEST_POISON="5@0")
    run.completed()
    assert run.curves()[6:] == whole.curves()[6:]  # NaN is not equal to itself in the step before
    ours, theirs = run.tensors(), whole.tensors()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_row_19_nothing_poisoned_is_saved(tmp_path: Path) -> None:
    write(tmp_path, 4)
    with pytest.raises(InputError, match=r"checkpoint-5: found a value that is not finite in model\.safetensors w"):
        write(tmp_path, 5, value=float("nan"))
    snapshot = tiny_snapshot()
    snapshot["optimizer.bin"]["state"]["w"]["exp_avg"][7] = float("inf")
    with pytest.raises(InputError, match=r"not finite in optimizer\.bin state w exp_avg"):
        write_checkpoint(tmp_path, TrainingState(6, 8, 48), Provenance(), snapshot)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_the_oracle_has_no_skipped_step(oracle: Run) -> None:
    assert read_metrics(oracle.folder / "metrics.jsonl")[-1]["train/nonfinite_steps"] == 0
