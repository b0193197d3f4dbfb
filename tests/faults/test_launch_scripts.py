"""The launch scripts: the commands of a dry run, and the SLURM job that requeues itself."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import NO_DROPOUT, Run, launch_environment
from tests.processes import WAIT_S

ROOT = Path(__file__).parents[2]
SRUN = '#!/usr/bin/env bash\n[[ "$1" == --kill-on-bad-exit=1 ]] && shift\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$SCONTROL_CALLS"\n'


def dry_run(script: str, **variables: str) -> str:
    command = ["bash", f"scripts_bash/{script}", "training.seed=3"]
    environment = launch_environment(DRY_RUN="1", **variables)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_dry_run_prints_the_command_and_runs_nothing(tmp_path: Path) -> None:
    printed = dry_run("rear_train_multinode.sh", NUM_NODES="4", NODE_RANK="2", MASTER_ADDR="node0", OUTPUT_DIR="out/x")
    assert printed.startswith("torchrun --nnodes=4 --nproc_per_node=8 --max_restarts=0 ")
    assert "--rdzv_backend=c10d --rdzv_endpoint=node0:29500" in printed
    assert "is_host=false" in printed
    assert printed.strip().endswith("config=configs/rear_b.yaml experiment.output_dir=out/x training.seed=3")
    assert "is_host=true" in dry_run("rear_train_multinode.sh", NUM_NODES="4", NODE_RANK="0")
    printed = dry_run("slurm_train.sbatch", CONFIG="configs/rear_l.yaml", SLURM_JOB_ID="7", SLURM_NNODES="1")
    assert printed.splitlines()[0].startswith("srun ")
    assert "--rdzv_id=7" in printed
    assert "--rdzv_endpoint=127.0.0.1:20007" in printed
    assert "config=configs/rear_l.yaml experiment.output_dir=outputs/rear_l" in printed


def test_the_slurm_script_asks_for_a_signal_to_the_batch_shell() -> None:
    text = (ROOT / "scripts_bash/slurm_train.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", text, re.MULTILINE)
    assert "#SBATCH --requeue\n" in text


class Job:
    """`slurm_train.sbatch` with a queue that does not exist."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.calls, self.commands = run, folder / "scontrol_calls", folder / "bin"
        self.commands.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (self.commands / name).write_text(text)
            (self.commands / name).chmod(0o755)

    def start(self, *overrides: str, **variables: str) -> subprocess.Popen:
        path = f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        config = self.run.arguments[0].removeprefix("config=")
        common = {"CONFIG": config, "OUTPUT_DIR": str(self.run.folder), "GPUS_PER_NODE": "2"}
        common |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "SCONTROL_CALLS": str(self.calls)}
        return subprocess.Popen(
            ["bash", "scripts_bash/slurm_train.sbatch", *self.run.arguments[1:-1], *NO_DROPOUT, *overrides],
            env=launch_environment(PATH=path, **common, **variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_slurm_job_saves_before_its_time_limit_and_requeues_itself(pair: Run, tmp_path: Path) -> None:
    job = Job(pair, tmp_path)
    process = job.start("training.max_train_steps=3000", "experiment.save_every=1000")
    try:
        pair.wait_for_step(10)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "training ended: status preempted" in output
    assert job.calls.read_text() == f"requeue {os.getpid()}\n"
    step = pair.status().step
    assert pair.checkpoints() == [f"checkpoint-{step}"]

    process = job.start("training.max_train_steps=3000", f"training.stop_steps={step + 3}", SLURM_RESTART_COUNT="1")
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    assert "training ended: status completed" in output
    assert job.calls.read_text().count("requeue") == 1

    process = job.start(f"training.stop_steps={step + 6}", "training.max_train_steps=3000", "training.seed=x")
    output, _ = process.communicate(timeout=WAIT_S)
    assert job.calls.read_text().count("requeue") == 1  # a failed start is not requeued
