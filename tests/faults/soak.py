"""Kill -9 at random moments of a run of two processes; the end must equal an uninterrupted run. Not part of CI.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m tests.faults.soak 20 --seed 0

Takes a few minutes. One rank, drawn at random, is killed while it starts, in the middle of a step or of a save, in
whatever it happens to be doing; the same command is then given again. Writes to a temporary folder, or to --folder.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from tests.conftest import make_tiny_project
from tests.faults.runs import Run, assert_equal_runs
from utils.run.metrics_file import read_metrics

STEPS, SAVE_EVERY = 1500, 7  # enough for all kills on a fast machine
STARTUP_SHARE, STARTUP_S = 0.2, 2.0  # of the kills, and in how many seconds after the start


def main(kills: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    (folder / "project").mkdir()
    config = make_tiny_project(folder / "project")
    arguments = [f"config={config}", f"training.max_train_steps={STEPS}", f"experiment.save_every={SAVE_EVERY}"]
    arguments += ["training.per_gpu_batch_size=4", "training.process_group_timeout=30", "training.launch_timeout=15"]
    oracle = Run(arguments, folder / "oracle").completed(processes=2)
    run = Run(arguments, folder / "run")
    started, done = [], 0
    while done < kills:
        run.start(processes=2)
        rank = rng.randrange(2)
        if rng.random() < STARTUP_SHARE:
            time.sleep(rng.uniform(0, STARTUP_S))
        else:
            wait_for_more_steps(run, rng.randint(1, 20))
            time.sleep(rng.uniform(0, 0.1))
        os.kill(run.processes[rank].pid, signal.SIGKILL)
        codes = run.wait()
        assert codes[rank] == -signal.SIGKILL, f"the run was over before kill {done + 1}: {codes}"
        done += 1
        checkpoints = run.checkpoints() if run.folder.exists() else []
        started.append(checkpoints[-1] if checkpoints else "none")
        print(f"kill {done}: rank {rank}, exit codes {codes}, newest checkpoint {started[-1]}", flush=True)
    run.completed(processes=2)
    assert_equal_runs(run, oracle)
    print(f"{done} kills at {len(set(started))} different checkpoints; weights, optimizer, losses and ids are equal")


def wait_for_more_steps(run: Run, count: int) -> None:
    """Until the run has made that many steps since it found its checkpoint, or has ended."""
    metrics = run.folder / "metrics.jsonl"
    before = None
    while all(process.is_alive() for process in run.processes):
        if "per step on 2 processes" in run.output(0):  # the metrics are cut at the checkpoint by now
            lines = len(read_metrics(metrics))
            before = lines if before is None else before
            if lines >= before + count:
                return
        time.sleep(0.005)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="a new folder that is kept")
    given = parser.parse_args()
    if given.folder is not None:
        given.folder.mkdir(parents=True)
    main(given.kills, given.seed, given.folder or Path(tempfile.mkdtemp(prefix="soak-")))
