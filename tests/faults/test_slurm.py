"""`slurm_train.sbatch` in a real SLURM: each way in which a job ends saves, and puts the job back or does not."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Run
from tests.faults.slurm import Slurm, running_slurm

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
LONG = ["training.max_train_steps=100000", "experiment.save_every=100000"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def assert_saved(run: Run) -> int:
    """The step of the only checkpoint, which is that of the stop."""
    status = run.status()
    assert status.status == "preempted"
    assert run.checkpoints() == [f"checkpoint-{status.step}"]
    return status.step


def test_the_time_limit_saves_and_requeues_and_scancel_saves_and_does_not(slurm: Slurm, pair: Run) -> None:
    job = slurm.train(pair, *LONG, options=("--time=2", "--signal=B:USR1@20"))
    slurm.wait_for(job, "PENDING", restarts=1)
    step = assert_saved(pair)
    slurm.wait_for(job, "RUNNING", restarts=1)
    pair.wait_for_step(step + 3)
    assert f"steps {step} to 100000" in pair.log()

    slurm("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    slurm.wait_until(lambda: "status preempted" in slurm.log(pair).read_text().rpartition("start number 0")[2])
    assert pair.checkpoints() == [f"checkpoint-{step}", f"checkpoint-{pair.status().step}"]
    assert slurm.job(job)["Restarts"] == "1"
    assert slurm("squeue", "--noheader") == ""


def test_a_signal_to_the_batch_shell_saves_and_the_next_job_completes(slurm: Slurm, pair: Run) -> None:
    job = slurm.train(pair, "training.max_train_steps=60", "experiment.save_every=100000")
    pair.wait_for_step(5)
    slurm("scancel", "--signal=USR1", "--batch", job)
    slurm.wait_for(job, "PENDING", restarts=1)
    step = assert_saved(pair)
    slurm.wait_for(job, "COMPLETED", restarts=1)
    assert f"steps {step} to 60" in pair.log()
    assert [row[0] for row in pair.curves()] == [*range(1, 61)]


@pytest.mark.parametrize("by", ["preemption", "scontrol"])
def test_preemption_and_requeue_save_and_start_again(slurm: Slurm, pair: Run, by: str) -> None:
    job = slurm.train(pair, *LONG)
    pair.wait_for_step(5)
    if by == "scontrol":
        slurm("scontrol", "requeue", job)
    else:
        slurm("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    slurm.wait_for(job, "PENDING", restarts=1)
    step = assert_saved(pair)
    pair.wait_for_step(step + 1)
    assert f"steps {step} to 100000" in pair.log()
    assert slurm.job(job)["Restarts"] == "1"
    slurm("scancel", job)
    slurm.wait_for(job, "CANCELLED")


def test_jobs_that_fail_or_were_requeued_too_often_are_not_requeued(slurm: Slurm, pair: Run) -> None:
    job = slurm.train(pair, "training.seed=x")
    slurm.wait_for(job, "FAILED")
    job = slurm.train(pair, *LONG, MAX_REQUEUES="0")
    pair.wait_for_step(5)
    slurm("scancel", "--signal=USR1", "--batch", job)
    slurm.wait_for(job, "FAILED")
    assert_saved(pair)
    assert slurm.job(job)["Restarts"] == "0"


def test_two_tasks_without_a_launcher_are_refused(slurm: Slurm, run: Run, tmp_path: Path) -> None:
    script = ["scripts/train_rear.py", *run.arguments]
    slurm("srun", "--ntasks=2", f"--error={tmp_path}/%t", sys.executable, *script, check=False)
    for task in range(2):
        assert "SLURM_STEP_NUM_TASKS=2 in the environment" in (tmp_path / str(task)).read_text()
    assert not run.folder.exists()
