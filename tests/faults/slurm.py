"""A SLURM of one node: Debian's daemons on this machine, with ports, state and logs of their own."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.runs import NO_DROPOUT, Run, launch_environment
from tests.processes import WAIT_S, free_port

ROOT = Path(__file__).parents[2]
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=6
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=low Nodes=node0 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node0 PriorityTier=2 PreemptMode=off
"""

# cred_expire: seconds until a requeued job may start again.


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        ports = {"controller_port": free_port(), "node_port": free_port()}
        (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), folder=folder, **ports))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = launch_environment(PATH=path, SLURM_CONF=str(folder / "slurm.conf"))
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "node0"]):
            with (self.folder / command[0]).with_suffix(".log").open("w") as log:
                process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            self.daemons.append(process)
        self.wait_until(lambda: "idle" in self("sinfo", "--noheader", "--format=%t", check=False))

    def stop(self) -> None:
        self("scancel", "--user=root", "--full", "--signal=KILL", check=False)
        self("scancel", "--user=root", check=False)
        for process in reversed(self.daemons):
            process.terminate()
            process.wait(WAIT_S)

    def __call__(self, *command: str, check: bool = True, **variables: str) -> str:
        done = subprocess.run(command, env=self.environment | variables, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def train(self, run: Run, *overrides: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit `slurm_train.sbatch` with two ranks; returns the number of the job."""
        variables |= {"CONFIG": run.arguments[0].removeprefix("config="), "OUTPUT_DIR": str(run.folder)}
        return self(
            *("sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=2", f"--output={self.log(run)}", *options),
            *("scripts_bash/slurm_train.sbatch", *run.arguments[1:-1], *NO_DROPOUT, *overrides),
            **{"GPUS_PER_NODE": "2", **variables},
        ).strip()

    def log(self, run: Run) -> Path:
        return Path(f"{run.folder}.slurm.log")

    def job(self, job: str) -> dict[str, str]:
        """JobState, Restarts and so on."""
        pairs = (field.partition("=") for field in self("scontrol", "show", "job", job).split())
        return {name: value for name, _, value in pairs}

    def wait_for(self, job: str, *states: str, restarts: int = 0) -> None:
        def is_there() -> bool:
            now = self.job(job)
            return now["JobState"] in states and int(now["Restarts"]) >= restarts

        self.wait_until(is_there)

    def wait_until(self, condition, seconds: int = 2 * WAIT_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self("squeue", "--long", "--states=all", check=False)
            time.sleep(0.3)


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """A SLURM with its files in `folder`; skips the test where it cannot be installed."""
    installed()
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def installed() -> None:
    """Install Debian's SLURM if it is missing; skips the test where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    if shutil.which("slurmctld") and shutil.which("slurmd"):
        return
    if shutil.which("apt-get") is None:
        pytest.skip("SLURM is not installed, and there is no apt-get")
    install = "apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["bash", "-c", install], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"SLURM could not be installed: {done.stderr.splitlines()[-1]}")
