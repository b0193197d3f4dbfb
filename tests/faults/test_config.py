"""Row 24 of the fault matrix: a wrong config ends before the slow imports and before any process group."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import launch_environment

ROOT = Path(__file__).parents[2]
WRONG = {
    "unknown key": ("training: {sed: 1}", "unknown key 'training.sed'; did you mean 'training.seed'"),
    "wrong type": ("training: {seed: abc}", "training.seed=abc: expected int"),
    "missing": ("training: {seed: 1}", "experiment.output_dir: missing value"),
    "duplicate": ("training: {seed: 1}\ntraining: {seed: 2}", "line 2: found duplicate key training"),
    "inconsistent": (
        "experiment: {eval_samples: 8, eval_every: 5}",
        "experiment.eval_samples=8: expected images in dataset.params.eval_shards_path_or_url",
    ),
    "batch": (
        "training: {global_batch_size: 100, per_gpu_batch_size: 8}",
        "training.global_batch_size=100: expected a multiple of 16 = per_gpu_batch_size=8 * 2 processes",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_row_24_exit_status_2_in_one_line_without_torch(tmp_path: Path, kind: str) -> None:
    text, message = WRONG[kind]
    path = tmp_path / "wrong.yaml"
    path.write_text(text + "\n")
    script = ROOT / "scripts/train_rear.py"
    command = [sys.executable, "-X", "importtime", str(script), f"config={path}"]
    if kind != "missing":
        command.append(f"experiment.output_dir={tmp_path / 'run'}")
    environment = launch_environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1
    assert lines[0].startswith("config error: ")
    assert message in lines[0]
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert "omegaconf" in imported
    assert "torch" not in imported
    assert not (tmp_path / "run").exists()
