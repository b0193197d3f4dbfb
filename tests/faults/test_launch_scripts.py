"""The launch scripts: the commands of a dry run, and signals on every road from a supervisor to the trainer."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.runs import Run, children_of, launch_environment
from tests.processes import WAIT_S, free_port

ROOT = Path(__file__).parents[2]


def dry_run(script: str, **variables: str) -> str:
    command = ["bash", f"scripts_bash/{script}", "training.seed=3"]
    environment = launch_environment(DRY_RUN="1", **variables)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_dry_run_prints_the_command_and_runs_nothing(tmp_path: Path) -> None:
    printed = dry_run("rear_train_multinode.sh", NUM_NODES="4", NODE_RANK="2", MASTER_ADDR="node0", OUTPUT_DIR="out/x")
    assert printed.startswith("torchrun --nnodes=4 --nproc_per_node=8 --max_restarts=0 ")
    assert "--rdzv_backend=c10d --rdzv_endpoint=node0:29500" in printed
    assert "is_host=false" in printed
    assert "--local_addr" not in printed
    assert printed.strip().endswith("config=configs/rear_b.yaml experiment.output_dir=out/x training.seed=3")
    printed = dry_run("rear_train_multinode.sh", NUM_NODES="4", NODE_RANK="0", LOCAL_ADDR="10.0.0.1")
    assert "is_host=true" in printed
    assert "--local_addr=10.0.0.1" in printed
    printed = dry_run("slurm_train.sbatch", CONFIG="configs/rear_l.yaml", SLURM_JOB_ID="7", SLURM_NNODES="1")
    assert printed.splitlines()[0].startswith("srun ")
    assert "--rdzv_id=7" in printed
    assert "--rdzv_endpoint=127.0.0.1:20007" in printed
    assert "--local_addr=127.0.0.1" in printed
    assert "config=configs/rear_l.yaml experiment.output_dir=outputs/rear_l" in printed


def test_the_slurm_script_asks_for_a_signal_to_the_batch_shell() -> None:
    text = (ROOT / "scripts_bash/slurm_train.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", text, re.MULTILINE)
    assert "#SBATCH --requeue\n" in text


# The commands as test_slurm.py sees them in a real SLURM: srun passes no signal on, but kills its step.
SRUN = """#!/usr/bin/env bash
"$PYTHON" -S "$TRAINER" & STEP=$!
echo $STEP > "$FOLDER/step"
trap 'kill -KILL $STEP' TERM
wait $STEP
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >> "$FOLDER/calls"
kill -s "${1#--signal=}" "$(cat "$FOLDER/step")"
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >> "$FOLDER/calls"\necho "JobState=$JOB_STATE Reason=None"\n'
TRAINER = """
import os, signal, sys, time
def write(status):
    with open(os.environ["OUTPUT_DIR"] + "/status.json", "w") as file:
        file.write('{"status": "%s"}' % status)
def save(*_):
    time.sleep(0.3)
    write("preempted")
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
write("running")
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("state", "variables", "requeued", "returncode"),
    [
        ("RUNNING", {}, True, 0),
        ("CANCELLED", {}, False, 1),  # a plain scancel
        ("RUNNING", {"SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"}, False, 1),
    ],
)
def test_the_slurm_job_signals_its_step_and_requeues_itself_unless_it_is_cancelled(
    tmp_path: Path, state: str, variables: dict[str, str], requeued: bool, returncode: int
) -> None:
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "trainer.py").write_text(TRAINER)
    variables |= {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    variables |= {"FOLDER": str(tmp_path), "OUTPUT_DIR": str(tmp_path), "TRAINER": str(tmp_path / "trainer.py")}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "JOB_STATE": state}
    job = start(["bash", "scripts_bash/slurm_train.sbatch"], **variables)
    wait_for_line(job, "started")
    job.send_signal(signal.SIGUSR1)
    assert_ends(job, returncode)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:2] == ["scancel --signal=TERM 7", "scontrol show job 7"]
    assert calls[2:] == ["scontrol requeue 7"] * requeued


def start(command: list[str], **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=launch_environment(**variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=default_signals,
    )


def default_signals() -> None:
    """Those that a suite in the background ignores; a shell cannot trap what is ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for_line(process: subprocess.Popen, line: str) -> None:
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"{line} was not printed")


def assert_ends(process: subprocess.Popen, returncode: int | None = None) -> str:
    """Returns the rest of its output."""
    try:
        output, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert returncode in (None, process.returncode), output
    return output


def as_pid_1(command: list[str]) -> list[str]:
    """As in a container, on a machine whose name does not resolve; skips the test where that is not permitted."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *user, "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("namespaces are not permitted here")
    return [*unshare, "bash", "-c", 'hostname no-such-host; exec "$@"', "bash", *command]


STEPS = """
set -euo pipefail
source scripts_bash/run.sh
run true
run "$PYTHON" -S -c '
import signal, sys, time
def stop(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)'
echo next step
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("in_container", [False, True])
def test_a_script_of_several_commands_passes_a_signal_on_and_stops(number: signal.Signals, in_container: bool) -> None:
    command = ["bash", "-c", STEPS]
    script = start(as_pid_1(command) if in_container else command, PYTHON=sys.executable)
    wait_for_line(script, "ready")
    os.kill(children_of(script.pid)[0] if in_container else script.pid, number)
    output = assert_ends(script, 128 + number)
    assert output.splitlines()[:2] == [f"got {number.name}", "saved"]
    assert "next step" not in output


def test_a_script_of_several_commands_ends_with_the_first_that_fails() -> None:
    script = start(["bash", "-c", "source scripts_bash/run.sh; run true; run bash -c 'exit 7'; echo next step"])
    assert assert_ends(script, 7) == ""


WAITING = """
import time
from utils.errors import input_errors_exit
with input_errors_exit():
    print("ready", flush=True)
    time.sleep(20)
    print("survived", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"])
def test_the_end_of_the_launcher_ends_its_process(name: str) -> None:
    launcher = start([sys.executable, "-c", LAUNCHER, WAITING], **{name: "no"})
    wait_for_line(launcher, "ready")
    launcher.kill()
    assert assert_ends(launcher) == ""  # which is complete when no process holds it any more


def test_pid_1_of_a_container_ends_by_sigterm_before_it_trains() -> None:
    process = start(as_pid_1([sys.executable, "-c", WAITING]))
    wait_for_line(process, "ready")
    os.kill(children_of(process.pid)[0], signal.SIGTERM)
    assert_ends(process, 128 + signal.SIGTERM)


TRAIN = "scripts/train_rear.py"
TORCHRUN = ["torchrun", "--nproc_per_node=2"]
ACCELERATE = ["accelerate", "launch", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
SEVERAL_COMMANDS = ["bash", "-c", f'source scripts_bash/run.sh; run python {TRAIN} "$@"', "bash"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("road", "processes"),
    [
        (["python", TRAIN], 1),
        ([*TORCHRUN, "--master_port={port}", TRAIN], 2),
        ([*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port={port}", TRAIN], 2),
        (SEVERAL_COMMANDS, 1),
        (["bash", "scripts_bash/rear_train.sh"], 1),
        (["bash", "scripts_bash/rear_train.sh"], 2),
        (["bash", "scripts_bash/rear_train_multinode.sh"], 2),
    ],
    ids=["python", "torchrun", "accelerate", "several-commands", "rear_train-1", "rear_train-2", "multinode"],
)
def test_sigterm_to_a_container_saves_and_ends_all(pair: Run, road: list[str], processes: int) -> None:
    arguments = pair.arguments[1:-1] if road[-1].startswith("scripts_bash/") else pair.arguments
    command = [*(word.format(port=free_port()) for word in road), *arguments]
    stop_by_sigterm(pair, as_pid_1(command), processes, in_container=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sigterm_to_accelerate_saves_and_ends_its_only_process(pair: Run) -> None:
    """As PID 1 accelerate does not get the signal: docs/cluster.md names the other roads."""
    stop_by_sigterm(pair, [*ACCELERATE, "--num_processes=1", TRAIN, *pair.arguments], 1, in_container=False)


def stop_by_sigterm(run: Run, command: list[str], processes: int, in_container: bool) -> None:
    variables = {"CONFIG": run.arguments[0].removeprefix("config="), "OUTPUT_DIR": str(run.folder)}
    variables |= {"NUM_GPUS": str(processes), "GPUS_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    longer = ["training.max_train_steps=100000", "experiment.save_every=100000", "training.launch_timeout=60"]
    console = Path(f"{run.folder}.console")
    with console.open("w") as output:
        process = subprocess.Popen(
            [*command, *longer], env=launch_environment(**variables), cwd=ROOT, stdout=output, stderr=output
        )
    try:
        run.wait_for_step(5)
        os.kill(children_of(process.pid)[0] if in_container else process.pid, signal.SIGTERM)
        process.wait(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while (left := processes_with(str(run.folder))) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        process.kill()
    assert left == []
    status = run.status()
    assert (status.status, status.reason) == ("preempted", "SIGTERM"), console.read_text()
    assert run.checkpoints() == [f"checkpoint-{status.step}"]
    assert f"on {processes} processes" in run.log()


def processes_with(argument: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found
