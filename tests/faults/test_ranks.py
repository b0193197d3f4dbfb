"""Rows 2 to 6 of the fault matrix: processes that die, hang or get signals; and the check at the launch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import worker
from tests.faults.runs import Run, assert_equal_runs, children_of, launch_environment
from tests.processes import STANDALONE, WAIT_S
from utils.run.status import EXIT_PREEMPTED, read_status


@pytest.mark.multiprocess
def test_row_2_sigkill_of_one_rank(pair: Run, pair_oracle: Run) -> None:
    assert pair(processes=2, REAR_FAULT="step.6@1:kill") == [1, -signal.SIGKILL]
    assert "step 6: another rank is gone or did not answer" in pair.output(0)
    assert pair.status().status == "failed"
    pair.completed(processes=2)
    assert "steps 4 to 12" in pair.log()
    assert_equal_runs(pair, pair_oracle)


@pytest.mark.multiprocess
def test_row_3_a_hanging_rank_ends_with_the_name_of_the_timeout(pair: Run, pair_oracle: Run) -> None:
    pair.start("training.process_group_timeout=4", processes=2, REAR_FAULT="step.6@1:sleep")
    pair.processes[0].join(WAIT_S)
    assert pair.processes[0].exitcode == 1
    assert pair.processes[1].is_alive()
    pair.processes[1].kill()
    assert "within training.process_group_timeout=4 s" in pair.output(0)
    pair.completed(processes=2)
    assert_equal_runs(pair, pair_oracle)


@pytest.mark.multiprocess
def test_every_micro_batch_has_dropout_of_its_own(pair: Run) -> None:
    more = ["training.per_gpu_batch_size=2", "training.gradient_accumulation_steps=2", "training.max_train_steps=3"]
    seeds = pair.completed(*more, processes=2).dropout_seeds()
    assert [len(of_step) for of_step in seeds.values()] == [4, 4, 4]  # two ranks, two micro-steps
    assert len({seed for of_step in seeds.values() for seed in of_step}) == 12


@pytest.mark.multiprocess
def test_row_4_sigterm_to_the_launcher(pair: Run, pair_oracle: Run) -> None:
    """With a second SIGTERM to every worker while it saves."""
    command = ["-m", *STANDALONE, "--nproc_per_node=2", worker.__file__, *pair.arguments]
    command += ["experiment.save_every=1000"]  # the second signal comes in the only save
    environment = launch_environment(TEST_RECORD=str(pair.new_record()), TEST_HOLD="6", TEST_SIGNAL_IN_SAVE="1")
    launcher = subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        pair.wait_for_step(6)
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=WAIT_S)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    status = read_status(pair.folder)
    assert status.status == "preempted", errors
    assert status.reason == "SIGTERM"
    assert status.step == 7  # that of the signal
    assert pair.checkpoints()[-1] == f"checkpoint-{status.step}"
    pair.completed(processes=2)
    assert f"steps {status.step} to 12" in pair.log()
    assert_equal_runs(pair, pair_oracle)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_row_5_a_signal_to_one_rank(pair: Run, pair_oracle: Run, number: signal.Signals, rank: int) -> None:
    pair.start(processes=2, TEST_SLOW="0.2")
    pair.wait_for_step(5)
    os.kill(pair.processes[rank].pid, number)
    assert pair.wait() == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    status = pair.status()
    assert status.status == "preempted"
    assert pair.checkpoints()[-1] == f"checkpoint-{status.step}"
    assert pair.ids().keys() == set(range(status.step))
    pair.completed(processes=2)
    assert_equal_runs(pair, pair_oracle)


def test_row_5_the_saved_step_is_the_one_of_the_signal(run: Run, oracle: Run) -> None:
    run.start(TEST_SLOW="0.3")
    run.wait_for_step(5)
    os.kill(run.processes[0].pid, signal.SIGUSR1)
    seen = len(run.curves())
    assert run.wait() == [EXIT_PREEMPTED]
    assert run.status().step <= seen + 1
    assert not (run.folder / "model.safetensors").exists()
    run.completed()
    assert_equal_runs(run, oracle)


def test_row_6_dataloader_workers_ignore_stop_signals(run: Run, oracle: Run) -> None:
    run.start("dataset.params.num_workers_per_gpu=2", TEST_SLOW="0.2")
    run.wait_for_step(3)
    workers = [pid for pid in children_of(run.processes[0].pid) if b"resource_tracker" not in cmdline(pid)]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    assert run.wait() == [0]
    assert run.status().status == "completed"
    assert_equal_runs(run, oracle)


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.multiprocess
def test_launch_names_the_rank_that_differs(pair: Run) -> None:
    assert pair(processes=2, per_rank={1: ["training.seed=7", "training.max_grad_norm=3"]}) == [1, 1]
    assert "rank 1 differs from rank 0 in config and code: " in pair.output(0)
    for difference in ("training.max_grad_norm: found 3.0, expected 1.0", "training.seed: found 7, expected 42"):
        assert difference in pair.output(0)
    assert "error" not in pair.output(1)
    assert not pair.folder.exists()


@pytest.mark.multiprocess
def test_launch_names_other_data(pair: Run, tmp_path: Path, tiny_config_file: Path) -> None:
    """Same path, other content, as on local disks that were filled at different times."""
    lines = (tiny_config_file.parent / "codes.jsonl").read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
        (tmp_path / f"node{rank}/codes.jsonl").write_text("".join(lines if rank else reversed(lines)))
    codes = pair("dataset.params.pretokenization=codes.jsonl", processes=2, TEST_CWD=f"{tmp_path}/node{{rank}}")
    assert codes == [1, 1]
    assert "launch: rank 1 differs from rank 0 in data: hash: found " in pair.output(0)


@pytest.mark.multiprocess
def test_launch_names_the_rank_that_is_missing(pair: Run) -> None:
    pair.start("training.launch_timeout=3", processes=2)
    pair.processes[1].kill()
    assert pair.wait()[0] == 1
    assert "of 2 processes, rank 1 did not arrive within training.launch_timeout=3 s" in pair.output(0)


@pytest.mark.multiprocess
def test_an_input_error_of_rank_0_ends_all_ranks(pair: Run, tmp_path: Path) -> None:
    started = time.monotonic()
    codes = pair(f"dataset.params.pretokenization={tmp_path / 'absent.jsonl'}", processes=2)
    assert codes == [1, 1]
    assert "no such file" in pair.output(0)
    assert time.monotonic() - started < WAIT_S
