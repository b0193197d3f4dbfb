"""The smallest study, as shipped, with the real scripts: killed, with a failed cell, with a sweep, and on SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.slurm import Slurm, running_slurm
from tests.processes import ROOT, WAIT_S
from utils.run.metrics_file import read_metrics
from utils.run.status import read_status_or_none

CELLS = [("ar", 1), ("ar", 2), ("rear", 1), ("rear", 2)]
LONG_WAIT_S = 10 * WAIT_S


class TinyStudy:
    """configs/studies/tiny.yaml on random tokens.

    Attributes:
        data: overrides of the plan that name them.
    """

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        lines = [{"class_id": i % 12, "tokens": rng.integers(0, 512, 64).tolist()} for i in range(48)]
        (folder / "codes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        np.savez(folder / "reference.npz", arr_0=rng.integers(0, 256, (24, 64, 64, 3), np.uint8))
        self.data = [
            f"dataset.params.pretokenization={folder / 'codes.jsonl'}",
            f"reference={folder / 'reference.npz'}",
        ]

    def words(self, output: Path, *more: str) -> list[str]:
        return ["config=configs/studies/tiny.yaml", *self.data, f"output_dir={output}", *more]

    def start(self, *words: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "scripts/study.py", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=LONG_WAIT_S)
        finally:
            process.kill()
        return process.returncode, output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    return TinyStudy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tiny: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run by one worker, without an interruption."""
    output = tmp_path_factory.mktemp("whole") / "tiny"
    status, printed = tiny.run(*tiny.words(output, "workers=1"))
    assert status == 0, printed
    return output


def results(output: Path) -> list[dict[str, Any]]:
    """Without seconds."""
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def wait_until(is_so: Any, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LONG_WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def step_of(cell: Path) -> int:
    status = read_status_or_none(cell / "run")
    return 0 if status is None else status.step


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_with_a_failed_cell_and_two_workers_it_gives_the_same_results(
    tiny: TinyStudy, whole: Path, tmp_path: Path
) -> None:
    rows = results(whole)
    assert [(row["arm"], row["seed"]) for row in rows] == CELLS
    assert len({row["metrics"]["frechet_distance"] for row in rows}) == 4
    output = tmp_path / "killed"
    output.mkdir()
    (output / "ar").mkdir()
    (output / "ar/seed2").mkdir()
    (output / "ar/seed2/run").write_text("a file in place of the run folder")
    process = tiny.start(*tiny.words(output, "workers=2"))
    wait_until(lambda: (output / "rear/seed1/samples.npz").exists() or step_of(output / "rear/seed2") >= 10, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = json.loads((output / "rear/seed1/cell.json").read_text())["seconds"]
    assert finished
    before = {name: (output / f"rear/seed1/{name}.log").stat().st_size for name in finished}

    status, printed = tiny.run(*tiny.words(output, "workers=2"))
    assert status == 1
    assert re.search(r"ar/seed2 failed: train: .*ar/seed2/run.*; see .*ar/seed2/train\.log", printed)
    assert "not complete: ar/seed2 (failed); rerun" in printed
    assert {name: (output / f"rear/seed1/{name}.log").stat().st_size for name in finished} == before
    (output / "ar/seed2/run").unlink()
    status, printed = tiny.run(*tiny.words(output, "workers=2"))
    assert status == 0
    assert results(output) == rows
    assert "| H1 | rear vs ar | 2 |" in printed
    status, printed = tiny.run(*tiny.words(output, "training.max_train_steps=21"))
    assert status == 1
    assert "training.max_train_steps: found 20, expected 21" in printed


@pytest.mark.slow
@pytest.mark.multiprocess
def test_identical_arms_differ_by_nothing(tiny: TinyStudy, tmp_path: Path) -> None:
    """And training that a stop signal interrupts continues where it was."""
    output = tmp_path / "same"
    words = tiny.words(output, "arms={ar: {}, rear: {}}", "workers=2")
    process = tiny.start(*words)
    wait_until(lambda: step_of(output / "ar/seed1") >= 10, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=LONG_WAIT_S)
    assert process.returncode == 75, printed
    status, printed = tiny.run(*words)
    assert status == 0, printed
    rows = results(output)
    assert [row["metrics"] for row in rows[:2]] == [row["metrics"] for row in rows[2:]]
    assert len({row["config_sha256"] for row in rows}) == 1
    assert "| +0.00 % | +0.00 to +0.00 % | 1 | 1 | 0 | no difference beyond 3 % |" in printed


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_sweep_as_a_stage(tiny: TinyStudy, tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    more = ["stages=[train, sweep]", "guidance_scales=[1, 2]", "metric=tuned/frechet_lite0", "arms={ar: {}, rear: {}}"]
    status, printed = tiny.run(*tiny.words(output, *more, "workers=2"))
    assert status == 0, printed
    sweep = json.loads((output / "ar/seed1/sweep/sweep.json").read_text())
    best = min(sweep["settings"], key=lambda row: row["choosing_half"])
    metrics = results(output)[0]["metrics"]
    assert len(sweep["settings"]) == 2
    assert metrics["tuned/frechet_lite0"] == best["other_half"]
    assert metrics["tuned/guidance_scale"] == best["guidance_scale"]


def wait_for_cell(output: Path, name: str, step: int) -> None:
    deadline = time.monotonic() + LONG_WAIT_S
    metrics = output / name / "run/metrics.jsonl"
    while not metrics.exists() or all(row["step"] < step for row in read_metrics(metrics)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.mark.slow
@pytest.mark.multiprocess
def test_tasks_of_a_job_array_share_the_cells_and_are_requeued(slurm: Slurm, tiny: TinyStudy, tmp_path: Path) -> None:
    output = tmp_path / "slurm"
    train_only = ["stages=[train]", "metric=val/ar_loss", "n=null", "reference=null", "workers=1"]
    validated = ["experiment.eval_every=150", tiny.data[0].replace("pretokenization", "eval_pretokenization")]
    longer = ["training.max_train_steps=150", "experiment.save_every=150", "experiment.log_every=1"]
    job = slurm(
        *("sbatch", "--parsable", "--array=1-2", "--gpus-per-node=0", "--cpus-per-task=1"),
        *(f"--output={tmp_path}/%a.log", "scripts_bash/slurm_study.sbatch"),
        *tiny.words(output, *train_only, *validated, *longer),
    ).strip()
    wait_for_cell(output, "ar/seed1", 5)
    wait_for_cell(output, "rear/seed1", 5)
    slurm("scancel", "--signal=USR1", "--batch", f"{job}_1")
    slurm.wait_until(lambda: slurm("squeue", "--noheader") == "", seconds=LONG_WAIT_S)
    log = (tmp_path / "1.log").read_text()
    assert "study ended: exit 75" in log
    assert "start number 1" in log
    assert "study ended: exit 0" in log
    assert len(results(output)) == 4
    logs = "".join(path.read_text() for path in output.glob("*/*/train.log"))
    assert logs.count("scripts/train_rear.py") == 5  # the interrupted training started twice
