"""Faults of the environment: console, disk, signals of a terminal, a second launch, environment variables."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from scripts import train_rear
from tests.faults.runs import Run, assert_equal_runs
from tests.processes import WAIT_S, start_script
from utils.config import load_config
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.launch_variables import ignored_launcher_settings
from utils.run import run_environment
from utils.run.metrics_file import MetricsFile, read_metrics
from utils.run.status import EXIT_PREEMPTED, Status, StatusFile, read_status, write_status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_the_end_of_the_terminal_save_and_stop(run: Run, oracle: Run, number: signal.Signals) -> None:
    run.start(TEST_SLOW="0.2")
    run.wait_for_step(5)
    for _ in range(2):  # from the terminal and from torchrun
        os.kill(run.processes[0].pid, number)
    assert run.wait() == [EXIT_PREEMPTED]
    assert (run.status().status, run.status().reason) == ("preempted", number.name)
    run.completed()
    assert_equal_runs(run, oracle)


def test_a_second_ctrl_c_ends_at_once(run: Run) -> None:
    run.start(REAR_FAULT="step.4:sleep")
    run.wait_for_step(4)
    os.kill(run.processes[0].pid, signal.SIGINT)
    for _ in range(5):  # on a busy machine the first one arrives late; a second soon after it counts as torchrun's
        time.sleep(1.2)
        if run.processes[0].is_alive():
            os.kill(run.processes[0].pid, signal.SIGINT)
            run.processes[0].join(5)
    assert run.wait() == [-signal.SIGINT]
    assert "interrupted" in run.output()
    assert run.status().status == "failed"


def test_a_second_launch_is_refused_and_the_first_continues(run: Run, oracle: Run) -> None:
    run.start(TEST_SLOW="0.2")
    run.wait_for_step(3)
    assert run.status().step >= 1  # while it runs
    config = load_config(run.arguments)
    with pytest.raises(InputError, match=rf"process {run.processes[0].pid} on "):
        train_rear.main(config)
    assert run.wait() == [0]
    assert_equal_runs(run, oracle)
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".lock")]


def test_a_killed_run_starts_at_once_and_says_so(run: Run, oracle: Run) -> None:
    assert run(REAR_FAULT="step.6") == [-signal.SIGKILL]
    assert (run.folder / ".lock").exists()
    run.completed()
    assert "the previous launch was killed at step 6 or later" in run.log()
    assert_equal_runs(run, oracle)


@pytest.mark.parametrize(("before", "after"), [("running", "failed"), ("preempted", "failed"), ("completed",) * 2])
def test_a_start_that_fails_is_no_running_or_preempted_run(run: Run, before: str, after: str) -> None:
    run.folder.mkdir()
    write_status(run.folder, Status(before, 3))
    with pytest.raises(InputError, match="no complete checkpoint"):
        train_rear.main(load_config([*run.arguments, "experiment.resume=true"]))
    assert (read_status(run.folder).status, read_status(run.folder).step) == (after, 3)


def test_a_folder_in_the_place_of_a_file_fails_in_one_line_and_in_the_status(run: Run) -> None:
    (run.folder / "config.yaml").mkdir(parents=True)
    assert run() == [1]
    assert run.output().splitlines()[-1].startswith("error: ")
    assert "config.yaml: Is a directory" in run.output()
    assert "Traceback" not in run.output()


def test_metrics_wait_for_room_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(tmp_path / "absent/metrics.jsonl")
    with pytest.warns(UserWarning, match="its lines are kept for the next write"):
        metrics.append(1, {"lr": 1.0})
    with pytest.raises(OSError, match="absent"):
        metrics.flush()
    metrics.path = path
    metrics.append(2, {"lr": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_full_disk_behind_the_console_costs_no_training(fault_arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "console"
    for kind in (".out", ".err"):
        Path(f"{output}{kind}").symlink_to("/dev/full")
    folder = tmp_path / "run"
    arguments = [*fault_arguments, f"experiment.output_dir={folder}", "training.enable_wandb=true"]
    process = start_script(["scripts/train_rear.py", *arguments], output, WANDB_MODE="offline")
    process.join(WAIT_S)
    assert process.exitcode == 0
    status = read_status(folder)
    assert (status.status, status.step, status.eta_s) == ("completed", 12, 0)


def test_the_script_exits_with_75_after_a_signal(fault_arguments: list[str], tmp_path: Path) -> None:
    endless = [*fault_arguments, "training.max_train_steps=100000", f"experiment.output_dir={tmp_path / 'run'}"]
    process = start_script(["scripts/train_rear.py", *endless], tmp_path / "console")
    deadline = time.monotonic() + WAIT_S
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.is_file() and read_metrics(metrics)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(WAIT_S)
    assert process.exitcode == EXIT_PREEMPTED == 75
    assert read_status(tmp_path / "run").status == "preempted"


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_environment.describe_environment().startswith("commit unknown\n")


def test_status_is_written_in_place_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(tmp_path, Status("running", 1000, "a long reason"))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.run.status.atomic_file", full)
    write_status(tmp_path, Status("failed", 7))
    status = read_status(tmp_path)
    assert (status.status, status.step) == ("failed", 7)


def test_a_rank_that_outlives_its_launch_leaves_the_status_of_the_next(tmp_path: Path) -> None:
    """Rank 0 was killed, and a new launch has begun before rank 1 notices."""
    ctx = DistributedContext(1, 1, torch.device("cpu"))  # of size 1, so that it asks nobody
    for owner, expected in ((os.getpid(), "failed"), (1, "running")):
        (tmp_path / ".lock").write_text(f"filelock/2\npid={owner}\nhost=x\nmode=lease\ntoken=a\nduration=30.0\n")
        write_status(tmp_path, Status("running", 3))
        StatusFile(tmp_path, ctx, Status("running", 3), lock_owner=os.getpid()).fail("lost")
        assert read_status(tmp_path).status == expected


def test_settings_of_the_launcher_without_effect_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert ignored_launcher_settings() == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert [line.split(" (from")[0] for line in ignored_launcher_settings()] == [
        "ACCELERATE_USE_DEEPSPEED=true in the environment"
    ]


def test_one_process_where_more_were_asked_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):  # as `accelerate launch --num_processes=2` sets them
        monkeypatch.setenv(name, "no")
    assert [line for line in ignored_launcher_settings() if "--multi_gpu makes it start all of them" in line]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ignored_launcher_settings() == []


@pytest.mark.multiprocess
def test_a_hanging_rank_prints_its_stack(pair: Run) -> None:
    pair.start("training.process_group_timeout=4", processes=2, REAR_FAULT="step.6@1:sleep")
    pair.processes[0].join(WAIT_S)
    pair.processes[1].kill()
    assert "Timeout (0:00:04)!" in pair.output(1)
    assert "in fault_point" in pair.output(1)
