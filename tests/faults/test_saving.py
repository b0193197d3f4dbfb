"""Rows 1, 7, 8 and 16 of the fault matrix: what can go wrong while a checkpoint is written."""

import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.runs import Run, assert_equal_runs
from utils.run import checkpoint
from utils.run.checkpoint import Snapshot, list_checkpoints, prune_checkpoints, write_checkpoint
from utils.run.manifest import Provenance, TrainingState

# Where the run dies, and what it finds at the next start.
KILLS = {
    "save.begin.8": ("checkpoint-4", "checkpoint-8.tmp"),
    "save.model.8": ("checkpoint-4", "checkpoint-8.tmp"),
    "save.optimizer.8": ("checkpoint-4", "checkpoint-8.tmp"),
    "save.manifest.8": ("checkpoint-4", "checkpoint-8.tmp"),
    "save.rename.8": ("checkpoint-4", "checkpoint-8.tmp"),
    "save.prune.4": ("checkpoint-12", None),
    "save.begin.4": (None, "checkpoint-4.tmp"),
}


@pytest.mark.parametrize("point", KILLS)
def test_row_1_sigkill_at_every_point_of_a_save(run: Run, oracle: Run, point: str) -> None:
    newest, unfinished = KILLS[point]
    assert run(REAR_FAULT=point) == [-signal.SIGKILL]
    assert run.status().status == "running"
    assert run.checkpoints()[-1:] == ([newest] if newest else [])
    assert unfinished is None or (run.folder / unfinished).is_dir()
    run.completed()
    assert f"steps {newest.removeprefix('checkpoint-') if newest else 0} to 12" in run.log()
    assert_equal_runs(run, oracle)
    assert not list(run.folder.glob("*.tmp"))
    assert run.checkpoints() == ["checkpoint-8", "checkpoint-12"] or point == "save.prune.4"


def test_row_1_sigkill_between_steps(run: Run, oracle: Run) -> None:
    assert run(REAR_FAULT="step.10") == [-signal.SIGKILL]
    run.completed()
    assert_equal_runs(run, oracle)


def test_row_7_full_disk_is_one_line_and_training_continues(run: Run, oracle: Run) -> None:
    run.completed(REAR_FAULT="save.model.8:enospc")
    lines = [line for line in run.log().splitlines() if "not written" in line]
    assert len(lines) == 1
    assert "checkpoint-8" in lines[0]
    assert "No space left on device; needed" in lines[0]
    assert "GB, free" in lines[0]
    assert run.checkpoints() == ["checkpoint-4", "checkpoint-12"]
    assert not list(run.folder.glob("*.tmp"))
    assert_equal_runs(run, oracle)


def test_row_7_failures_in_a_row_end_the_run(run: Run) -> None:
    run("training.stop_steps=2")
    before = {path: path.read_bytes() for path in (run.folder / "checkpoint-2").iterdir()}
    limits = ["experiment.save_every=2", "experiment.max_save_failures=2"]
    assert run(*limits, REAR_FAULT="save.model:enospc") == [1]
    assert "checkpoints failed 2 times in a row (experiment.max_save_failures)" in run.output()
    assert f"the last good checkpoint is {run.folder / 'checkpoint-2'}" in run.output()
    assert run.status().status == "failed"
    assert {path: path.read_bytes() for path in (run.folder / "checkpoint-2").iterdir()} == before
    assert run.checkpoints() == ["checkpoint-2"]


def tiny_snapshot(value: float = 0.0) -> Snapshot:
    optimizer = {"state": {"w": {"exp_avg": torch.zeros(100_000)}}, "param_groups": []}
    return {"model.safetensors": {"w": torch.full((3,), value)}, "optimizer.bin": optimizer}


def write(folder: Path, step: int, value: float = 0.0) -> None:
    write_checkpoint(folder, TrainingState(step, 8, 8 * step), Provenance(), tiny_snapshot(value))


def test_row_7_a_real_limit_on_the_file_size_leaves_nothing(tmp_path: Path) -> None:
    """torch.save reports it as a RuntimeError."""
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    write(tmp_path, 2)
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.multiprocess
def test_row_8_rank_0_raises_in_a_save(pair: Run, pair_oracle: Run) -> None:
    pair.completed(processes=2, REAR_FAULT="save.optimizer.8@0:raise")
    assert pair.checkpoints() == ["checkpoint-4", "checkpoint-12"]
    assert_equal_runs(pair, pair_oracle)


@pytest.mark.multiprocess
def test_row_8_rank_0_raises_in_the_last_save(pair: Run, pair_oracle: Run) -> None:
    assert pair(processes=2, REAR_FAULT="save.optimizer.12@0:raise") == [1, 1]
    for rank in range(2):
        assert "step 12: the save failed at the end" in pair.output(rank)
    assert pair.status().status == "failed"
    pair.completed(processes=2)
    assert_equal_runs(pair, pair_oracle)


@pytest.mark.multiprocess
def test_row_8_all_ranks_end_when_saves_failed_too_often(pair: Run) -> None:
    codes = pair("experiment.max_save_failures=1", processes=2, REAR_FAULT="save.optimizer.4@0:raise")
    assert codes == [1, 1]
    for rank in range(2):
        assert "checkpoints failed 1 times in a row" in pair.output(rank)


def test_row_16_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in (4, 6, 8, 10, 12, 14):
        write(tmp_path, step)
        prune_checkpoints(tmp_path, keep_last=2, keep_every=4)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (4, 8, 12, 14)]


def test_row_16_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (4, 6):
        write(tmp_path, step)
    (tmp_path / "checkpoint-6/model.safetensors").write_bytes(b"short")
    write(tmp_path, 8)
    prune_checkpoints(tmp_path, keep_last=2, keep_every=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]


def test_row_16_a_failing_deletion_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (4, 6, 8):
        write(tmp_path, step)
    with monkeypatch.context() as patch:

        def refuse(path: Path, **options: object) -> None:
            raise PermissionError(f"{path}: busy")

        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(PermissionError):
            prune_checkpoints(tmp_path, keep_last=2, keep_every=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]
    write(tmp_path, 10)
    prune_checkpoints(tmp_path, keep_last=2, keep_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8"]


def test_row_16_a_failing_deletion_does_not_stop_training(run: Run, oracle: Run) -> None:
    run.completed(REAR_FAULT="save.prune.4:enospc")
    assert "an old checkpoint could not be deleted" in run.log()
    assert run.checkpoints() == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert_equal_runs(run, oracle)


def test_row_16_a_crash_while_a_checkpoint_is_replaced_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 4)
    write(tmp_path, 6)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", lambda *arguments: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            write(tmp_path, 6, value=1.0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    write(tmp_path, 6, value=1.0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
